"""``openvino``, imported without its telemetry.

``import openvino`` starts a thread that reports the import to its vendor over the network. The
server of a robot does no such thing. The package does without ``openvino_telemetry`` where that is
not installed, so while it is imported that is not.
"""

from __future__ import annotations

import sys

_TELEMETRY = "openvino_telemetry"
_hidden = _TELEMETRY not in sys.modules
if _hidden:
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
try:
    import openvino as ov
    import openvino.opset15 as op
finally:
    if _hidden:
        del sys.modules[_TELEMETRY]

__all__ = ["op", "ov"]
