from forgejax.report.final.endings import make_endings


def test_each_stop_reason_that_occurred_has_a_line_with_its_share_of_training() -> None:
    lines = make_endings({"completed": 3}, {"completed": 6, "agent_failed": 2}, {"truncated": 1})
    assert [(line.reason, line.failed, line.before, line.training, line.share, line.after) for line in lines] == [
        ("completed", False, 3, 6, 0.75, 0),
        ("truncated", False, 0, 0, 0.0, 1),
        ("agent_failed", True, 0, 2, 0.25, 0),
    ]
    assert make_endings({}, {}, {}) == ()
