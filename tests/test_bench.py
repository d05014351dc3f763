"""The benchmarks still run, with hardly anything to do: no figure is looked at."""

import functools

import bench
import pytest


@pytest.mark.long
@pytest.mark.parametrize("group", ["listing", "facts", "photo"])
def test_what_is_measured_beside_a_bare_client_can_be_measured(monkeypatch, capsys, group):
    for size in ("LARGE", "MEDIUM", "SMALL", "PHOTOS"):
        monkeypatch.setattr(bench, size, 12)
    monkeypatch.setattr(bench, "measured", functools.partial(bench.measured, runs=1))
    bench.GROUPS[group]()
    told = capsys.readouterr().out
    assert "| API: " in told
    assert "| database: " in told
