import re
from pathlib import Path

from forgejax.report.final.courses import Course
from forgejax.report.final.headlines import describe_time, make_headlines
from forgejax.report.final.history import AttemptSpan
from forgejax.report.final.html import Example, Report, make_slices, render_html, write_html
from forgejax.report.final.invariants import Bounds, check_invariants
from forgejax.types import Failure
from tests.report.final.example import summary

BOUNDS = Bounds(disorder=3, staleness_steps=2)


def test_a_sound_run_holds_every_invariant() -> None:
    assert {check.name: check.holds for check in check_invariants(summary(), BOUNDS)} == {
        "Token drift": True,
        "Token account": True,
        "Group account": True,
        "Log-prob gap": True,
        "Window disorder": True,
        "Staleness": True,
        "Failed episodes": True,
    }


def test_each_invariant_breaks_on_its_own() -> None:
    broken = {
        "Token drift": summary(drift_tokens=1),
        "Token account": summary(tokens_sampled=1001),
        "Group account": summary(groups_dispatched=21),
        "Log-prob gap": summary(logprob_gap_max=2e-4),
        "Window disorder": summary(window_disorder_max=4),
        "Staleness": summary(staleness_steps_max=3),
        "Failed episodes": summary(episodes={"completed": 5, "deadline": 4, "environment_failed": 1, "cancelled": 9}),
    }
    for name, given in broken.items():
        assert [check.name for check in check_invariants(given, BOUNDS) if not check.holds] == [name]


def test_a_gap_measured_on_too_few_tokens_neither_holds_nor_is_broken() -> None:
    for given in (summary(logprob_gap_tokens=1000), summary(logprob_gap_max=None)):
        assert {check.name: check.holds for check in check_invariants(given, BOUNDS)}["Log-prob gap"] is None
        page = render_html(Report(title="run", summary=given, bounds=BOUNDS))
        assert "No invariant was broken; too little was measured to tell of Log-prob gap." in page and "✗" not in page


def test_a_gap_above_its_bound_is_broken_however_few_tokens_show_it() -> None:
    given = summary(logprob_gap_max=2e-4, logprob_gap_tokens=3)
    assert {check.name: check.holds for check in check_invariants(given, BOUNDS)}["Log-prob gap"] is False


def test_the_greedy_window_claims_no_bound() -> None:
    found = {check.name: check for check in check_invariants(summary(), Bounds(disorder=None, staleness_steps=None))}
    assert found["Staleness"].holds is None and found["Staleness"].bound == "none claimed"


def test_a_change_is_called_noise_below_two_standard_errors() -> None:
    clear = make_headlines(summary(eval_gain=None))[0].words
    assert clear == "The mean outcome changed by +0.500: better, 10.0 standard errors."
    noisy = make_headlines(summary(eval_gain=None, eval_reward_after=0.34))[0].words
    assert noisy.endswith("within the noise (one standard error of the difference is 0.050).")
    worse = make_headlines(summary(eval_gain=None, eval_reward_after=0.1))[0].words
    assert "-0.150: worse, 3.0 standard errors" in worse
    alone = make_headlines(summary(eval_gain=None, eval_reward_before=None))[0]
    assert alone.before == "—" and "one side only" in alone.words


def test_the_account_lists_trained_first_then_reasons_by_size() -> None:
    found = make_slices(70, {"a": 10, "b": 15}, unaccounted=5)
    assert [(entry.name, entry.count, entry.share) for entry in found] == [
        ("trained", 70, 0.7),
        ("b", 15, 0.15),
        ("a", 10, 0.1),
        ("unaccounted", 5, 0.05),
    ]


def test_text_of_the_run_is_escaped_everywhere_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> \"' {{ 7 * 7 }} \ud800"
    episode = Example(question=evil, answer=evil, tool_calls=1, reward=1.0, transcript=evil)
    path = write_html(
        tmp_path,
        Report(
            title=evil,
            summary=summary(tokens_not_trained={evil: 300}, figures={evil: 1.0}),
            bounds=BOUNDS,
            curve_png=b"\x89PNG",
            examples_before=[episode],
            examples_after=[episode],
            config=evil,
            command_line=evil,
            courses=[Course(title=evil, words=evil, png=b"\x89PNG")],
            failures=[Failure(task_id=evil, reason=evil, error=evil)],
            date=evil,
            machine={evil: evil},
            versions={evil: evil},
        ),
    )
    page = path.read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 18
    assert "{{ 7 * 7 }}" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:image/png;base64,iVBORw=="] * 2
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_says_whether_the_invariants_hold() -> None:
    sound = render_html(Report(title="run", summary=summary(), bounds=BOUNDS))
    assert "No invariant was broken" in sound and "✗" not in sound
    broken = render_html(Report(title="run", summary=summary(drift_tokens=3), bounds=BOUNDS))
    assert "1 of the 7 invariants does not hold" in broken and broken.count("✗ broken") == 1


def test_trained_tokens_whose_ids_could_not_be_compared_are_told_with_the_account() -> None:
    told = summary(unaudited_tokens=12)
    drift = next(check for check in check_invariants(told, BOUNDS) if check.name == "Token drift")
    assert (drift.holds, drift.measured) == (True, f"0 tokens; 12 of {told.tokens_trained:,} could not be compared")
    words = "The ids of 12 of the trained tokens could not be compared"
    assert words in render_html(Report(title="run", summary=told, bounds=BOUNDS))
    assert "could not be compared" not in render_html(Report(title="run", summary=summary(), bounds=BOUNDS))


def test_the_longest_figure_may_wrap_so_that_none_is_cut_off_on_a_phone() -> None:
    page = render_html(Report(title="run", summary=summary(), bounds=BOUNDS))
    assert "table.figures td.number { white-space: normal; }" in page
    figures = page[page.index("<h2>Further figures</h2>") :]
    assert figures.index('<table class="figures">') < figures.index("Training steps")


def test_a_run_that_measured_nothing_still_has_a_page() -> None:
    nothing = summary(
        **{
            name: None
            for name in vars(summary())
            if name.startswith(
                ("eval_reward", "tool_use", "episode_s", "logprob_gap_m", "tree", "prefix", "stale", "wind")
            )
        },
        levels={},
        tokens_sampled=0,
        tokens_trained=0,
        tokens_not_trained={},
        groups_dispatched=0,
        groups_trained=0,
        groups_not_trained={},
        episodes={},
        episodes_masked={},
    )
    page = render_html(Report(title="run", summary=nothing, bounds=BOUNDS))
    assert "The run was not evaluated." in page and "There was nothing to draw." in page


def test_a_long_transcript_is_cut_and_says_by_how_much() -> None:
    episode = Example(question="q", answer=None, tool_calls=0, reward=0.0, transcript="x" * 20_123)
    page = render_html(Report(title="run", summary=summary(), bounds=BOUNDS, examples_after=[episode]))
    assert "[123 more characters]" in page and "none given" in page
    assert page.count("x" * 20_000) == 1


def test_a_paired_interval_decides_what_is_noise() -> None:
    better = make_headlines(summary(eval_gain=0.5, eval_gain_low=0.42, eval_gain_high=0.58))[0].words
    assert better == "Task by task the outcome changed by +0.500, 95 % interval +0.420 to +0.580: better."
    assert (
        "within the noise" in make_headlines(summary(eval_gain=0.1, eval_gain_low=-0.01, eval_gain_high=0.2))[0].words
    )
    assert "worse" in make_headlines(summary(eval_gain=-0.1, eval_gain_low=-0.2, eval_gain_high=-0.01))[0].words


def test_what_is_paired_is_called_paired_and_what_is_not_is_not() -> None:
    paired = render_html(Report(title="run", summary=summary(), bounds=BOUNDS))
    assert "The change over all tasks is paired, task by task" in paired
    apart = render_html(Report(title="run", summary=summary(eval_gain=None), bounds=BOUNDS))
    assert "paired" not in apart and "as if its two sides were independent" in apart


def test_episodes_stand_under_their_stop_reasons_with_the_words_of_one_that_failed() -> None:
    failure = Failure(
        task_id="sum-7", reason="agent_failed", error="ended with status 3; its stderr ends with:\nno tool"
    )
    page = render_html(
        Report(
            title="run",
            summary=summary(),
            bounds=BOUNDS,
            ended_before={"completed": 64},
            ended_after={"completed": 60, "deadline": 4},
            failures=[failure],
        )
    )
    table = re.sub(r"<[^>]*>|\n", " ", page[page.index("How episodes ended") : page.index("Where the tokens went")])
    lines = [" ".join(line.split()) for line in re.split(r"(?=completed|truncated|deadline|agent_failed)", table)]
    assert lines[1].startswith("completed 64 70 87.5% 60 The agent came to its end")
    assert lines[2].startswith("truncated 0 6 7.5% 0 ") and lines[3].startswith("deadline 0 0 0.0% 4 ")
    assert lines[4].startswith("agent_failed 0 4 5.0% 0 The agent program crashed")
    assert "masked, so that they train nothing and enter no baseline: agent_failed 4." in " ".join(lines)
    assert "The last episode that ended by agent_failed, on task sum-7" in page
    assert "its stderr ends with:\nno tool</pre>" in page


def test_an_interrupted_run_tells_its_attempts() -> None:
    spans = [
        AttemptSpan(attempt=1, first_step=1, last_step=20, began="2026-01-01 10:00 UTC", ended="2026-01-01 11:00 UTC"),
        AttemptSpan(attempt=3, first_step=21, last_step=40, began="2026-01-02 10:00 UTC", ended="2026-01-02 11:00 UTC"),
    ]
    history = ["Attempt 2: from step 20, 3 steps after it are done again; changed: run.steps 30 -> 40 <b>"]
    page = render_html(Report(title="run", summary=summary(), bounds=BOUNDS, attempts=spans, history=history))
    assert "done again; changed: run.steps 30 -&gt; 40 &lt;b&gt;</p>" in page
    assert "<h3>Attempts</h3>" in page and "21 to 40</td><td>2026-01-02 10:00 UTC" in page
    once = render_html(Report(title="run", summary=summary(), bounds=BOUNDS, attempts=spans[:1]))
    assert "in one go, from 2026-01-01 10:00 UTC to 2026-01-01 11:00 UTC" in once


def test_where_time_went_is_said_in_words() -> None:
    said = describe_time(summary(figures={"step_s": 50.0, "wait_share": 0.625, "packing_wait_share": 0.02}))
    assert said == (
        "The training steps took 50.0s of the run's 1m01s. The trainer spent 60% of that waiting for groups that "
        "agents had not finished and 2% waiting for their packing; in the rest it trained, probed and saved. "
        "The agents and the engine are the slower side: more groups in flight or engine slots may help."
    )
    trainer = describe_time(summary(figures={"step_s": 50.0, "wait_share": 0.05, "packing_wait_share": 0.0}))
    assert trainer is not None and "The trainer is the slower side" in trainer
    assert describe_time(summary()) is None
