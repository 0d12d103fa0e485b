from forgejax.report.final.history import AttemptSpan, format_date, list_attempts


def test_an_attempt_spans_its_own_steps_and_dates() -> None:
    rows = [
        {"step": 0, "time": 0.0, "eval/outcome": 0.5},
        {"step": 1, "time": 60.0, "process/attempt": 1},
        {"step": 2, "time": 120.0, "process/attempt": 1},
        {"step": 3, "time": 86400.0, "process/attempt": 3},
    ]
    first, third = list_attempts(rows)
    assert first == AttemptSpan(
        attempt=1, first_step=1, last_step=2, began="1970-01-01 00:01 UTC", ended="1970-01-01 00:02 UTC"
    )
    assert (third.attempt, third.first_step, third.last_step) == (3, 3, 3)
    assert third.began == third.ended == "1970-01-02 00:00 UTC"
    assert list_attempts([]) == () and format_date(None) == ""
