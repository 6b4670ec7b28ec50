"""The meter against tensors counted by hand."""

import torch

from llava.efficiency.meter import Meter


def test_the_meter_counts_what_lives() -> None:
    weight = torch.ones(1000)
    with Meter() as meter:
        a = torch.empty(250)  # 1000 bytes
        assert (meter.live, meter.peak) == (1000, 1000)
        b = a + 1
        c = b.view(50, 5)[10:]
        assert meter.live == 2000  # a view is no tensor more
        del a, b
        assert meter.live == 1000  # which the view keeps
        c += 1
        d = weight[:100]
        e = weight.mul_(2)
        assert meter.live == 1000  # what is older does not count, in whatever shape
        f = [torch.zeros(25, dtype=torch.float64) for _ in range(3)]
        assert meter.live == 1600
        del c, d, e, f
        assert (meter.live, meter.peak) == (0, 2000)


def test_a_span_counts_its_peak_and_what_was_laid_by() -> None:
    with Meter() as meter:
        meter.mark("llm 1")
        with meter.span("llm 1", {}):
            a = torch.empty(100)
            del a
        assert meter.own == {"llm": 400}
        kept = torch.empty(50)
        meter.mark("llm 2")
        with meter.span("llm 2", {"llm 2": 0}):
            a = torch.empty(100)
        assert meter.own["llm"] == 600  # 200 bytes more at its beginning than without the method
        del a, kept
        with meter.span("tower select", {"tower select": 999}):
            torch.empty(10)
        assert meter.own == {"tower": 40, "llm": 600}  # saving elsewhere excuses nothing
        assert meter.points == {"llm 1": 0, "llm 2": 200, "tower select": 0}
        assert meter.peaks == {"llm 1": 400, "llm 2": 600}
