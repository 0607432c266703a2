"""The KV cache of a language model as a library: paging, exact prefix reuse, paged attention.

The nouns are those of the C header:

| here | header |
|---|---|
| `Cache`, `Sequence`, `Step`, `Batch`, `Scoring` | `kvc_cache_*`, `kvc_seq_*`, `kvc_step_*` |
| `Pool`, `Prefix` | `kvc_pool_*`, `kvc_prefix_*` |
| `attend`, `append`, `merge_states`, `Rope` | `kvc_attend*`, `kvc_append*`, `kvc_rope_*` |
| `Rows` | none: an array that is looked at once |
| `GroupSpec`, `plan` | `kvc_group_spec`, `kvc_plan_*` |
| `Device`, `DevicePrefix`, `choose_cascade` | `kvc_device_*` |
| `Prefetch`, `TierCounts` | `kvc_prefetch_*`, `kvc_tier_*` |
| `Cache.onboard`, `LoadProgress` | `kvc_onboard_*` |
| `Events`, `Metrics` | `kvc_events_*`, `kvc_metrics_*` |
| `errors` | `kvc_status` |

Arrays are torch tensors, NumPy arrays, or anything with the buffer protocol or DLPack, taken without a
copy. Calls release the interpreter's lock. `kvcache.transformers` puts Hugging Face models on a cache.
"""

from . import errors
from .arrays import Rows
from .cache import Cache, CacheCounts, Sequence
from .device import Device, DeviceFacts, DeviceMemory, DeviceRates
from .errors import Error, OutOfBlocks
from .events import Event, Events, EventsCounts
from .info import _require, abi_version, build_info, version
from .kernels import append, attend, kernel_name, merge_states, workspace_size
from .layout import GroupSpec, Plan, PlanGroup, plan
from .metrics import Histogram, Metrics
from .pool import Pool, PoolCounts
from .prefix import (
    Answer,
    Commit,
    Hit,
    Inserted,
    Position,
    Prefix,
    PrefixCounts,
    Query,
    Ran,
    Retention,
)
from .quantised import Scales, Tiles, code_bytes, scale_bytes
from .rope import Rope
from .shared import CascadeEstimate, CascadePrefix, CascadeSegment, DevicePrefix, choose_cascade
from .step import Batch, Scoring, Step, Work
from .tier import LoadProgress, Prefetch, TierCounts, TierDecision, TierSlice

_require()
__version__ = version()

__all__ = [
    "Answer",
    "Batch",
    "Cache",
    "CacheCounts",
    "CascadeEstimate",
    "CascadePrefix",
    "CascadeSegment",
    "Commit",
    "Device",
    "DeviceFacts",
    "DeviceMemory",
    "DeviceRates",
    "DevicePrefix",
    "Error",
    "Event",
    "Events",
    "EventsCounts",
    "GroupSpec",
    "Histogram",
    "Hit",
    "Inserted",
    "LoadProgress",
    "Metrics",
    "OutOfBlocks",
    "Plan",
    "PlanGroup",
    "Pool",
    "PoolCounts",
    "Position",
    "Prefetch",
    "Prefix",
    "PrefixCounts",
    "Query",
    "Ran",
    "Retention",
    "Rope",
    "Rows",
    "Scales",
    "Scoring",
    "Sequence",
    "Step",
    "TierCounts",
    "TierDecision",
    "TierSlice",
    "Tiles",
    "Work",
    "abi_version",
    "append",
    "attend",
    "build_info",
    "choose_cascade",
    "code_bytes",
    "errors",
    "kernel_name",
    "merge_states",
    "plan",
    "scale_bytes",
    "version",
    "workspace_size",
]
