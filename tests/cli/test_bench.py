"""`moma bench`: the defaults of the options are those of the modules."""

import inspect

import pytest

from moma.bench import data as bench_data
from moma.bench import generate as bench_generate
from moma.bench import layer as bench_layer
from moma.bench import throughput as bench_throughput
from moma.cli import bench as cli_bench


@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        (cli_bench.data, bench_data.Sizes()),
        (cli_bench.generate, bench_generate.Sizes()),
        (cli_bench.layer, bench_layer.Sizes()),
        (cli_bench.throughput, bench_throughput.Sizes()),
    ],
)
def test_option_defaults_match_the_module(command, sizes):
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(command).parameters.items()
    }
    shared = defaults.keys() & vars(sizes).keys()
    assert {"repeats", "cpu_time"} <= shared
    assert {name: defaults[name] for name in shared} == {name: vars(sizes)[name] for name in shared}
