"""Imports ``openvino`` without its telemetry.

``import openvino`` starts a thread that reports the import to the vendor over the network, which a
robot's server must not do. OpenVINO works without ``openvino_telemetry`` where that package is not
installed. So this module makes the package appear missing during the import.
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
