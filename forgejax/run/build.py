"""The composition root: the only file that knows every part of a run, and the order in which they live and die."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grain
import jax

from forgejax.agents import make_scaffold
from forgejax.chat import ChatFormat
from forgejax.environments import ReasoningGymTasks, SpeedBaseline
from forgejax.errors import ConfigError
from forgejax.gateway import Gateway
from forgejax.learner import Learner, PackGroups, judge, lay_empty
from forgejax.models import Params, abstract_policy, init_params, load_params
from forgejax.pool.codec import decode_group
from forgejax.pool.dataset import GroupBatch, GroupDataset
from forgejax.pool.journal import LOST_ATTEMPT, Journal
from forgejax.pool.pool import Pool
from forgejax.report.figures import group_figures
from forgejax.report.live.progress import Progress
from forgejax.report.sinks.jsonl import MetricsWriter
from forgejax.rollout import Driver, LocalSampler, PolicyEngine, RequestLog
from forgejax.run.actors import Parts, RolloutService
from forgejax.run.books import Books, StepData
from forgejax.run.checkpoint import Checkpoints, load_tree, save_tree
from forgejax.run.compiles import Compiles
from forgejax.run.config import ENGINE_DEVICES, TrainConfig, to_mapping
from forgejax.run.evaluate import Evaluated, keep, kept
from forgejax.run.loop import Trainer
from forgejax.run.rundir import RunDir
from forgejax.run.tally import Tally
from forgejax.run.warm_start import Demonstrations, cache_key, imitate, make_demonstrations
from forgejax.sharding import Layout, MeshPlan, build_mesh, prepare_platform, resolve, spare_devices

BEFORE_FILE = "evaluation-before.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves to be reported. ``finished`` is False for a run that was interrupted."""

    trainer: Trainer
    before: Evaluated | None
    after: Evaluated | None
    tokens_sampled: int
    tokens_not_trained: Mapping[str, int]
    cache_hit_rate: float
    finished: bool


def run(config: TrainConfig, place: RunDir, progress: Progress, on_ready: Callable[[Trainer], None]) -> Outcome:
    """Builds everything, evaluates, trains, evaluates again, and closes the books.

    ``on_ready`` gets the trainer as soon as it can be stopped. Raises ForgejaxError with a sentence for the user.
    """
    with ExitStack() as stack:
        trainer = build(config, place, progress, stack)
        on_ready(trainer)
        with progress.phase("compiling", "the engine"):
            trainer.pool.count_tokens("probe", sum(len(each.token_ids) for each in trainer.service.warm_up()))
        before = kept(place.path / BEFORE_FILE)
        if trainer.step == 0 and not trainer.stopping:
            before = trainer.evaluate()
            keep(place.path / BEFORE_FILE, before)
        trainer.service.start_groups()
        with progress.phase("training", f"{config.run.steps - trainer.step} steps"):
            trainer.train()
        finished = trainer.step >= config.run.steps
        trainer.service.stop_groups()
        trainer.pool.close()
        after = trainer.evaluate() if finished else None
        trainer.pool.rewind(trainer.step)  # what was prefetched and never trained goes back into the books
        trainer.checkpoints.wait()
        trainer.books.stamp()
        return _close(trainer, before, after, finished)


def _close(trainer: Trainer, before: Evaluated | None, after: Evaluated | None, finished: bool) -> Outcome:
    engine, tally = trainer.driver.metrics(), trainer.books.tally
    not_trained = Counter(trainer.pool.tokens().not_trained)
    not_trained["cancelled"] += sum(engine.tokens_cancelled.values())
    not_trained["request_failed"] += sum(engine.tokens_failed.values())
    not_trained["skipped_step"] += tally.skipped_tokens
    return Outcome(
        trainer=trainer,
        before=before,
        after=after,
        tokens_sampled=trainer.books.sampled_before + sum(engine.tokens_sampled.values()),
        tokens_not_trained={reason: tokens for reason, tokens in sorted(not_trained.items()) if tokens},
        cache_hit_rate=engine.cache_hit_rate,
        finished=finished,
    )


def build(config: TrainConfig, place: RunDir, progress: Progress, stack: ExitStack) -> Trainer:
    """Everything a run needs, started; ``stack`` takes it down in the right order."""
    began = time.monotonic()
    compiles = Compiles()
    stack.callback(compiles.close)
    plan, layout, device = _devices(config)
    with progress.phase("loading", "tokenizer and tasks"):
        chat = _chat(config)
        tasks = ReasoningGymTasks(config.tasks)
    checkpoints = Checkpoints(place.checkpoints, config.run.keep_checkpoints)
    stack.callback(checkpoints.close)
    resume_step = checkpoints.latest
    learner = _learner(config, layout, chat, tasks, progress, warm=resume_step is None)

    journal = Journal.open(place.journal_url)
    stack.callback(journal.close)
    pool = Pool.open(journal, config.pool, resume_step=resume_step or 0)
    batches = _batches(pool, config, learner.row_shards)
    stack.callback(batches.close)
    stack.callback(pool.close)
    step, tally = 0, Tally()
    if resume_step is not None:
        step, learner.state, saved = checkpoints.restore(learner.state, batches)
        tally = Tally.from_mapping(saved)
        progress.note(f"resumed from the checkpoint of step {step}")
    with progress.phase("compiling", f"the train step for {plan.describe()}"):
        learner.compile(lay_empty(config.packing, row_shards=learner.row_shards))

    requests = RequestLog(place.requests)
    stack.callback(requests.close)
    # What the engine drew for episodes that a crash cut off is known to its own log alone.
    sampled_before = max(requests.inherited_tokens, pool.inherited_tokens)
    pool.count_tokens(LOST_ATTEMPT, sampled_before - pool.inherited_tokens)
    engine = PolicyEngine(config.policy, config.engine, device=device)
    driver = Driver(engine, learner.params(), version=step, request_log=requests)
    gateway = Gateway(LocalSampler(driver), chat, config.engine.max_context, config.gateway)
    service = RolloutService(
        Parts(
            config=config,
            driver=driver,
            gateway=gateway,
            scaffold=make_scaffold(config.agent),
            tasks=tasks,
            pool=pool,
            requests=requests,
            baseline=_baseline(config, journal),
        )
    )
    with progress.phase("starting", "engine, gateway and agents"):
        stack.enter_context(service)
    progress.note(f"the gateway listens at {service.url}/v1; the run is in {place.path}")
    metrics = MetricsWriter(place.path, resumed_step=step if place.resumed else None)
    stack.callback(metrics.close)
    books = Books(
        config=config,
        learner=learner,
        driver=driver,
        requests=requests,
        pool=pool,
        metrics=metrics,
        progress=progress,
        gateway=gateway.metrics,
        tally=tally,
        compiles=compiles,
        sampled_before=sampled_before,
        counted_at=began,
    )
    return Trainer(
        config=config.run,
        learner=learner,
        service=service,
        driver=driver,
        pool=pool,
        tasks=tasks,
        chat=chat,
        batches=batches,
        checkpoints=checkpoints,
        books=books,
        progress=progress,
        step=step,
    )


def _devices(config: TrainConfig) -> tuple[MeshPlan, Layout, jax.Device]:
    """The learner's layout and the engine's device: one outside its mesh where there is one, for then their programs
    need not wait for each other; else the mesh's first. The engine's programs hold no collective: sharing is safe."""
    plan = resolve(config.mesh)
    prepare_platform(plan, extra_devices=ENGINE_DEVICES)
    mesh = build_mesh(plan)
    return plan, Layout(mesh=mesh), next(iter(spare_devices(mesh)), mesh.devices.flat[0])


def _chat(config: TrainConfig) -> ChatFormat:
    chat = ChatFormat.load(config.tokenizer_folder)
    if chat.vocab_size > config.policy.vocab_size:
        raise ConfigError(
            f"the tokenizer in {config.tokenizer_folder} has {chat.vocab_size} tokens and policy.vocab_size is "
            f"{config.policy.vocab_size}; raise it to at least that"
        )
    return chat


def _learner(
    config: TrainConfig, layout: Layout, chat: ChatFormat, tasks: ReasoningGymTasks, progress: Progress, *, warm: bool
) -> Learner:
    graphdef, _ = abstract_policy(config.policy)
    if warm and config.policy.path:
        with progress.phase("loading", config.policy.path):
            params = load_params(config.policy, layout)
    else:  # a resumed run only needs arrays to restore into
        params = init_params(config.policy, layout, config.run.seed)
    if warm and config.warm_start.steps:
        demonstrations = make_demonstrations(config.warm_start, tasks, chat, config.run.seed)
        params = _warm_params(config, params, layout, demonstrations, progress)
    return Learner(graphdef, params, config.step, layout=layout)


def _warm_params(
    config: TrainConfig, params: Params, layout: Layout, demonstrations: Demonstrations, progress: Progress
) -> Params:
    """Weights after the supervised phase, from the cache if some run has been through the very same one."""
    warm = config.warm_start
    step_config = warm.step_config(config.step)
    settings = [config.policy, warm, step_config, config.packing, config.tasks, config.mesh, config.run.seed]
    described = [to_mapping(each) for each in settings] + _weight_files(config.policy.path)
    cached = Path(warm.cache) / cache_key(described, demonstrations, config.tokenizer_folder)
    if warm.cache and cached.is_dir():
        progress.note(f"warm start taken from {cached}")
        return load_tree(cached, params)
    learner = Learner(abstract_policy(config.policy)[0], params, step_config, layout=layout)
    with progress.phase("warm start", f"{warm.steps} supervised steps"):
        imitate(learner, demonstrations, config.packing, _told(progress, warm.steps))
    params = learner.params()
    if warm.cache:
        save_tree(cached, params)
    return params


def _weight_files(path: str) -> list[tuple[str, int, int]]:
    """What tells the weights in ``policy.path`` from others put there later: names, sizes and times of the files."""
    found = sorted(Path(path).iterdir()) if path and Path(path).is_dir() else [Path(path)] if path else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _told(progress: Progress, steps: int) -> Callable[[int, float], None]:
    every = max(1, steps // 10)

    def tell(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            progress.note(f"warm start: step {step} of {steps}, loss {loss:.3f}")

    return tell


def _batches(pool: Pool, config: TrainConfig, row_shards: int) -> grain.DatasetIterator[StepData]:
    """Pool to packed steps, one batch ahead of the learner, in Grain's thread."""
    pack_groups = PackGroups(credit=config.credit, packing=config.packing, row_shards=row_shards)

    def prepare(batch: GroupBatch) -> StepData:
        began = time.monotonic()
        training = pack_groups(batch.groups)
        return StepData(
            number=batch.number,
            training=training,
            figures=group_figures(batch.groups),
            packing_began=began,
            packing_ended=time.monotonic(),
        )

    groups = GroupDataset(pool, judge(config.credit, config.packing))
    return iter(grain.experimental.ThreadPrefetchIterDataset(groups.map(prepare), prefetch_buffer_size=1))


def _baseline(config: TrainConfig, journal: Journal) -> SpeedBaseline:
    """The running medians as earlier attempts leave them, by the finished groups that the journal still holds."""
    baseline = SpeedBaseline(success_at=config.reward.success_at)
    for index, payload in journal.payloads():
        baseline.observe(decode_group(payload, index=index))
    return baseline
