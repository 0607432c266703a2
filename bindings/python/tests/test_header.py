"""The package against include/kvcache.h: nothing of the header is missing here."""

import ast
import re
from pathlib import Path

import kvcache
from kvcache import cache, device, events, kernels, layout, metrics, names, pool, prefix, quantised, shared, tier
from kvcache._native import ffi, lib
from kvcache.errors import BY_NAME

HEADER = (Path(__file__).parents[3] / "include" / "kvcache.h").read_text()
CODE = "\n".join(line for line in HEADER.splitlines() if not line.lstrip().startswith("//"))

# Functions that no method calls, and who does their work. A store of the engine's own is C: see tier.py.
ELSEWHERE = {"kvc_tier_store_init": "C", "kvc_prefix_create": "Prefix() goes by kvc_prefix_create_with"}
# Structs' fields that have no name here: sizes, holes.
UNSAID = {"struct_size", "reserved"}


def functions():
    return set(re.findall(r"^[a-z][\w ]*[ *](kvc_\w+)\(", CODE, re.M)) - {"kvc_events_fn"}


def called():
    """Names that the package's own sources take from the library, `options("x")` as x_init."""
    found = set()
    for path in Path(kvcache.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lib":
                found.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("options") and node.args:
                if isinstance(node.args[0], ast.Constant):
                    found.add(f"{node.args[0].value}_init")
    return found


def test_every_function_is_called_by_the_package():
    declared = functions()
    assert len(declared) > 90
    assert declared - called() == set(ELSEWHERE)
    for name in declared:
        assert getattr(lib, name)


def test_every_constant_has_a_word():
    constants = dict(re.findall(r"^#define (KVC_\w+) (-?\w+)", CODE, re.M))
    errors = {name for name in constants if name.startswith("KVC_ERR_")}
    assert errors == set(BY_NAME)
    words = {prefix + name.upper() for prefix, table in names.TABLES.items() for name in table}
    assert set(constants) - errors - words == {"KVC_OK", "KVC_ABI_VERSION"}
    assert all(getattr(lib, name) == int(value) for name, value in constants.items())


def test_every_field_that_comes_back_has_a_name():
    pairs = {
        "kvc_pool_counts": pool.PoolCounts,
        "kvc_prefix_counts": prefix.PrefixCounts,
        "kvc_cache_counts": cache.CacheCounts,
        "kvc_plan_group": layout.PlanGroup,
        "kvc_device_facts": device.DeviceFacts,
        "kvc_device_rates": device.DeviceRates,
        "kvc_device_cascade_estimate": shared.CascadeEstimate,
        "kvc_device_cascade_prefix": shared.CascadePrefix,
        "kvc_device_cascade_segment": shared.CascadeSegment,
        "kvc_events_counts": events.EventsCounts,
        "kvc_metrics": metrics.Metrics,
        "kvc_histogram": metrics.Histogram,
        "kvc_tier_counts": tier.TierCounts,
        "kvc_tier_decision": tier.TierDecision,
        "kvc_tier_slice": tier.TierSlice,
    }
    for name, kind in pairs.items():
        assert [f for f, _ in ffi.typeof(name).fields if f not in UNSAID] == list(kind._fields), name
    plan = [f for f, _ in ffi.typeof("kvc_plan_result").fields if f not in UNSAID]
    assert plan + ["groups"] == list(layout.Plan._fields)


def test_every_option_can_be_given():
    """Each field of an options struct occurs in the module that fills it."""
    modules = {
        "kvc_cache_options": cache,
        "kvc_prefix_options": prefix,
        "kvc_plan_options": layout,
        "kvc_group_spec": layout,
        "kvc_events_options": events,
        "kvc_attend_desc": kernels,
        "kvc_append_desc": kernels,
        "kvc_tier_options": tier,
        "kvc_device_cascade_query": shared,
        "kvc_device_lookup_desc": shared,
        "kvc_device_merge_desc": device,
        "kvc_scales": quantised,
        "kvc_tile_view": quantised,
        "kvc_seal_desc": quantised,
    }
    for name, module in modules.items():
        source = Path(module.__file__).read_text()
        for field, _ in ffi.typeof(name).fields:
            if field in UNSAID | {"user", "bad_block", "table_indptr", "store"} or field.endswith("_stride"):
                continue
            assert re.search(rf"\b{field}\b", source), f"{name}.{field}"


def test_the_library_is_that_of_the_header():
    assert kvcache.abi_version() == lib.KVC_ABI_VERSION
    assert kvcache.__version__ in kvcache.build_info()
