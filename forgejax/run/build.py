"""The composition root: the only file that knows every part of a run, and the order in which they live and die."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from forgejax.agents import EpisodeTally, make_scaffold
from forgejax.chat import ChatFormat
from forgejax.environments import Environment, SpeedBaseline, make_environment
from forgejax.gateway import Gateway
from forgejax.grammar import GrammarCompiler
from forgejax.learner import Learner, lay_empty
from forgejax.models import Params, abstract_policy
from forgejax.pool.journal import Journal
from forgejax.pool.pool import Pool, read_groups
from forgejax.report.live.progress import Progress
from forgejax.report.names import EVALUATION, STEP
from forgejax.report.sinks import open_sinks
from forgejax.report.sinks.jsonl import METRICS_FILE, read_metrics
from forgejax.rollout import (
    Archive,
    Driver,
    Engines,
    Launch,
    LocalEngines,
    PolicyEngine,
    RequestLog,
    RolloutConfig,
    ServerEngines,
    list_logs,
    make_environment_of_server,
)
from forgejax.run.account import RunAccount, RunSums, describe_unrecorded
from forgejax.run.actors import Parts, RolloutService
from forgejax.run.audit import Audit
from forgejax.run.checkpoint import Checkpoints
from forgejax.run.config import TrainConfig, to_mapping
from forgejax.run.loop import Outcome, Trainer
from forgejax.run.pod.engines import make_pod_engines
from forgejax.run.pod.lead import LeadingLearner
from forgejax.run.pod.leader import Leader
from forgejax.run.pod.orders import NOBODY_ELSE, Orders
from forgejax.run.preflight import lay_engine, load_chat
from forgejax.run.rows import Compiles, StepRows
from forgejax.run.rundir import RunDir, read_history
from forgejax.run.steps import PooledSteps
from forgejax.run.warm_start import (
    Demonstrations,
    describe_weights,
    find_first_weights,
    imitate,
    load_cached,
    make_cache_key,
    make_demonstrations,
    note_tenths,
    save_cached,
)
from forgejax.sharding import Layout, MeshPlan, build_mesh, prepare_platform, resolve

BEFORE_FILE = "evaluation-before.json"


def play_run(
    config: TrainConfig,
    place: RunDir,
    progress: Progress,
    on_ready: Callable[[Trainer], None],
    leader: Leader | None = None,
) -> Outcome:
    """Builds everything, has it trained and takes it down; what is left to report is plain data.

    ``leader``: of the other processes, where there are some. ``on_ready`` gets the trainer as soon as it can be
    stopped. Raises ForgejaxError with a sentence for the user.
    """
    with ExitStack() as stack:
        trainer = build(config, place, progress, stack, leader)
        on_ready(trainer)
        return trainer.run(place.path / BEFORE_FILE)


def build(
    config: TrainConfig, place: RunDir, progress: Progress, stack: ExitStack, leader: Leader | None = None
) -> Trainer:
    """Everything a run needs, started; ``stack`` takes it down in the right order."""
    began, compiles = time.monotonic(), Compiles()
    stack.callback(compiles.close)
    orders: Orders = NOBODY_ELSE if leader is None else leader
    orders.ask("see_run", str(place.path.absolute()))
    plan, layouts = _devices(config, leader)
    with progress.phase("loading", "tokenizer and tasks"):
        chat, environment = load_chat(config), make_environment(config.tasks)
    checkpoints = _open_checkpoints(config, place, orders, progress, stack)
    resume_step = checkpoints.latest
    learner = _learner(config, layouts[0], chat, environment, progress, orders=orders, warm=resume_step is None)
    journal, pool, steps = _data(config, place, learner, resume_step or 0, stack)
    step, sums = _restore(checkpoints, learner, steps, progress)
    _note_attempt(place, step, progress)
    with progress.phase("compiling", f"the train step for {plan.describe()}"):
        learner.compile(lay_empty(config.packing, row_shards=learner.row_shards))

    grammars = GrammarCompiler(chat.codec.spell_vocabulary())
    engines = _engines(config, place, learner, step, layouts=layouts, leader=leader, grammars=grammars, stack=stack)
    account = RunAccount.open(engines, pool, sums, counted_at=began)
    if unrecorded := describe_unrecorded(engines.account(), pool.tokens()):
        progress.note(unrecorded)
    gateway = Gateway(engines, chat, config.engine.max_context, config.gateway, grammars=grammars)
    tally = EpisodeTally(progress.note)
    service = _service(config, engines, gateway, environment=environment, pool=pool, journal=journal, tally=tally)
    with progress.phase("starting", "engine, gateway and agents"):
        stack.enter_context(service)
    _note_start(config, service.url, place, progress)
    sinks = open_sinks(place.path, progress, resumed_step=step if place.resumed else None)
    stack.callback(sinks.close)
    return Trainer(
        config=config.run,
        learner=learner,
        engines=engines,
        service=service,
        pool=pool,
        environment=environment,
        chat=chat,
        steps=steps,
        checkpoints=checkpoints,
        account=account,
        audit=_audit(config, learner, engines, sums),
        rows=StepRows(
            learner=learner,
            engines=engines,
            pool=pool,
            gateway=gateway.metrics,
            episodes=tally,
            compiles=compiles,
            sums=sums,
            sinks=sinks,
            progress=progress,
        ),
        progress=progress,
        step=step,
        missed_evaluation=_missed_evaluation(config, place, step) and bool(environment.held_out),
    )


def _open_checkpoints(
    config: TrainConfig, place: RunDir, orders: Orders, progress: Progress, stack: ExitStack
) -> Checkpoints:
    checkpoints = Checkpoints(place.checkpoints, config.run.keep_checkpoints, orders)
    stack.callback(checkpoints.close)
    for damage in checkpoints.set_aside:
        progress.note(damage)
    return checkpoints


def _devices(config: TrainConfig, leader: Leader | None) -> tuple[MeshPlan, tuple[Layout, Layout]]:
    """The learner's layout, and the one of the run's own engine where this process is alone."""
    plan = resolve(config.mesh)
    if leader is not None:
        layout = Layout(mesh=build_mesh(plan), shared=True)
        return plan, (layout, layout)
    prepare_platform(plan, extra_devices=config.rollout.mesh.devices)
    mesh = build_mesh(plan)
    engine = lay_engine(config.rollout.mesh, mesh)
    return plan, (Layout(mesh=mesh, shared=engine.shared), engine)


def _learner(
    config: TrainConfig,
    layout: Layout,
    chat: ChatFormat,
    environment: Environment,
    progress: Progress,
    *,
    orders: Orders,
    warm: bool,
) -> Learner:
    graphdef, _ = abstract_policy(config.policy)
    orders.give("begin", warm)
    with progress.phase("loading", "weights"):
        params = find_first_weights(config.policy, layout, seed=config.run.seed, fresh=warm)
    if warm and config.warm_start.steps:
        demonstrations = make_demonstrations(config.warm_start, environment, chat, config.run.seed)
        params = _warm_params(config, params, layout, demonstrations, progress, orders=orders)
    step = config.step.ending_at(config.run.steps)
    return LeadingLearner(graphdef, params, step, orders=orders, phase="run", layout=layout)


def _warm_params(
    config: TrainConfig,
    params: Params,
    layout: Layout,
    demonstrations: Demonstrations,
    progress: Progress,
    *,
    orders: Orders,
) -> Params:
    """Weights after the supervised phase, from the cache if some run has been through the very same one."""
    warm = config.warm_start
    step_config = warm.step_config(config.step)
    settings = [config.policy, warm, step_config, config.packing, config.tasks, config.mesh, config.run.seed]
    described = [to_mapping(each) for each in settings] + describe_weights(config.policy.path)
    cached = Path(warm.cache) / make_cache_key(described, demonstrations, config.tokenizer_folder)
    if warm.cache and (kept := load_cached(cached, params, progress.note, orders)) is not None:
        return kept
    graphdef = abstract_policy(config.policy)[0]
    learner = LeadingLearner(graphdef, params, step_config, orders=orders, phase="warm_start", layout=layout)
    with progress.phase("warm start", f"{warm.steps} supervised steps"):
        imitate(learner, demonstrations, config.packing, note_tenths(progress, warm.steps))
    params = learner.params()
    if warm.cache:
        save_cached(cached, params, progress.note, orders)
    return params


def _data(
    config: TrainConfig, place: RunDir, learner: Learner, resume_step: int, stack: ExitStack
) -> tuple[Journal, Pool, PooledSteps]:
    """The pool as the checkpoint of ``resume_step`` knew it, and the steps that are packed out of it."""
    journal = Journal.open(place.journal_url)
    stack.callback(journal.close)
    pool = Pool.open(journal, config.pool, resume_step=resume_step)
    steps = PooledSteps(
        pool,
        credit=config.credit,
        packing=config.packing,
        row_shards=learner.row_shards,
        lockstep=config.run.deterministic,
    )
    stack.callback(steps.close)
    stack.callback(pool.close)
    return journal, pool, steps


def _restore(checkpoints: Checkpoints, learner: Learner, steps: PooledSteps, progress: Progress) -> tuple[int, RunSums]:
    """Learner and data as the newest checkpoint has them, if there is one: its step and its sums."""
    if checkpoints.latest is None:
        return 0, RunSums()
    step, learner.state, saved = checkpoints.restore(learner.state, steps)
    progress.note(f"resumed from the checkpoint of step {step}")
    return step, RunSums.from_mapping(saved)


def _note_attempt(place: RunDir, step: int, progress: Progress) -> None:
    """Keeps and tells what this attempt goes on from; before the rows of the steps that it does again are cut away."""
    rows = read_metrics(place.path) if (place.path / METRICS_FILE).is_file() else []
    place.note_restored(step, max(0, int(rows[-1][STEP]) - step) if rows else 0)
    attempts = read_history(place.path)
    if place.resumed and attempts:
        progress.note(f"attempt {len(attempts)}, begun in {attempts[-1].folder}: {attempts[-1].describe()}")


def _engines(
    config: TrainConfig,
    place: RunDir,
    learner: Learner,
    step: int,
    *,
    layouts: tuple[Layout, Layout],
    leader: Leader | None,
    grammars: GrammarCompiler,
    stack: ExitStack,
) -> Engines:
    """The engines that the configuration asks for, with the learner's weights; they serve once they are entered.

    ``layouts``: the learner's, and that of an engine in this process.
    """
    launches = [_launch(config, place, number) for number in range(_count_servers(config.rollout))]
    local = config.rollout.engines == "local"
    current = {place.requests} if local and leader is None else {launch.requests for launch in launches}
    logs = [path for path in (place.requests, *list_logs(place.servers)) if path.exists() and path not in current]
    former = Archive(logs)
    stack.callback(former.close)  # where nothing comes to be entered
    if leader is not None:
        return make_pod_engines(
            config,
            place,
            learner,
            step,
            leader=leader,
            layout=layouts[0],
            launches=launches,
            former=former,
            grammars=grammars,
            stack=stack,
        )
    if not local:
        return ServerEngines(
            config.rollout,
            learner.weights,
            step,
            request_deadline_s=config.engine.request_deadline_s,
            launches=launches,
            former=former,
        )
    requests = RequestLog(place.requests)
    stack.callback(requests.close)
    engine = PolicyEngine(config.policy, config.engine, layouts[1])
    driver = Driver(engine, learner.params(), version=step, request_log=requests, grammars=grammars)
    return LocalEngines(driver, requests, former)


def _count_servers(config: RolloutConfig) -> int:
    return config.engines if isinstance(config.engines, int) else 0


def _launch(config: TrainConfig, place: RunDir, number: int) -> Launch:
    """A server of this run's policy, which waits for its weights."""
    command = [sys.executable, "-m", "forgejax.run.serving.program", f"--run={place.path}", "--await-weights"]
    folder = config.rollout.weights_folder
    root = [f"--publish-root={Path(folder).absolute()}"] if folder else []
    mesh = [f"--mesh.{axis}={size}" for axis, size in dataclasses.asdict(config.rollout.mesh).items()]
    return Launch(
        command=[*command, f"--token-env={config.rollout.token_env}", *root, *mesh],
        env=make_environment_of_server(),
        folder=place.servers / str(number),
    )


def _service(
    config: TrainConfig,
    engines: Engines,
    gateway: Gateway,
    *,
    environment: Environment,
    pool: Pool,
    journal: Journal,
    tally: EpisodeTally,
) -> RolloutService:
    return RolloutService(
        Parts(
            config=config,
            engines=engines,
            gateway=gateway,
            scaffold=make_scaffold(config.agent),
            environment=environment,
            pool=pool,
            baseline=_baseline(config, journal),
            tally=tally,
        )
    )


def _missed_evaluation(config: TrainConfig, place: RunDir, step: int) -> bool:
    """Whether the step that a run goes on from was to be evaluated, and an end came first."""
    every = config.run.eval_every
    if not 0 < step < config.run.steps or every == 0 or step % every:
        return False
    rows = [row for row in read_metrics(place.path) if row[STEP] == step]
    return not any(name.startswith(EVALUATION) for row in rows for name in row)  # one may have no outcome


def _audit(config: TrainConfig, learner: Learner, engines: Engines, sums: RunSums) -> Audit:
    return Audit(
        learner=learner,
        engines=engines,
        packing=config.packing,
        law=config.sampling,
        sums=sums,
    )


def _note_start(config: TrainConfig, url: str, place: RunDir, progress: Progress) -> None:
    if config.run.deterministic:
        progress.note(
            f"deterministic: {config.pool.window.in_flight} groups in flight, in lockstep with the updates, taken in "
            "order; every prompt is computed alone and every decode step serves all slots; speed earns no reward"
        )
    progress.note(f"the gateway listens at {url}/v1; the run is in {place.path}")


def _baseline(config: TrainConfig, journal: Journal) -> SpeedBaseline:
    """The running medians as earlier attempts leave them, by the finished groups that the journal still holds."""
    baseline = SpeedBaseline(success_at=config.reward.success_at)
    for group in read_groups(journal):
        baseline.observe(group)
    return baseline
