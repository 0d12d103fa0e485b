import re
from pathlib import Path

from forgejax.report.final.headlines import make_headlines
from forgejax.report.final.html import Example, Report, make_slices, render_html, write_html
from forgejax.report.final.invariants import Bounds, check_invariants
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


def test_a_gap_measured_on_too_few_tokens_is_no_gap() -> None:
    for given in (summary(logprob_gap_tokens=1000), summary(logprob_gap_max=None)):
        assert [check.name for check in check_invariants(given, BOUNDS) if not check.holds] == ["Log-prob gap"]


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
            versions={evil: evil},
        ),
    )
    page = path.read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 10
    assert "{{ 7 * 7 }}" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:image/png;base64,iVBORw=="]
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_the_page_says_whether_the_invariants_hold() -> None:
    sound = render_html(Report(title="run", summary=summary(), bounds=BOUNDS))
    assert "No invariant was broken" in sound and "✗" not in sound
    broken = render_html(Report(title="run", summary=summary(drift_tokens=3), bounds=BOUNDS))
    assert "1 of the 7 invariants does not hold" in broken and broken.count("✗ broken") == 1


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
