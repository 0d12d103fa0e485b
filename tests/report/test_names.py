import math

from forgejax.report.names import format_duration, format_value


def test_figures_are_written_as_people_read_them() -> None:
    assert format_value(0.5, "decimal") == "0.500"
    assert format_value(0.126, "share") == "13%"
    assert format_value(1234567.0, "count") == "1,234,567"
    assert format_value(3.14e-7, "tiny") == "3.1e-07"
    assert format_value(4.5, "times") == "4.50x"
    assert format_value(math.nan, "count") == "nan"


def test_durations_carry_over_to_the_next_unit() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.9, 59.96, 185, 3599.7, 7620)] == [
        "0.0s",
        "59.9s",
        "1m00s",
        "3m05s",
        "1h00m",
        "2h07m",
    ]
