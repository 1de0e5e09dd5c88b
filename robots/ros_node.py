"""A ROS 1 node in this process, without rospy's side effects on the program.

rospy is imported here and nowhere else, on first use. Debian's packages are outside a virtual
environment; their folder is *appended* to ``sys.path``, so that they replace no package of the
environment. ``rospy.init_node`` waits forever if no master answers, so the master is called first.
It also replaces the root logger's handlers, which are restored.

A process has one node, which lives until the process ends: rospy cannot start a second one.
"""

from __future__ import annotations

import atexit
import http.client
import importlib
import logging
import os
import sys
import threading
import urllib.parse
import xmlrpc.client
from typing import Any

from robots.errors import ConnectFailed

DIST_PACKAGES = "/usr/lib/python3/dist-packages"
PACKAGES = "python3-rospy python3-sensor-msgs python3-std-msgs"
DEFAULT_MASTER = "http://localhost:11311"
_lock = threading.Lock()
_publishers: dict[str, Any] = {}


class _TimedTransport(xmlrpc.client.Transport):
    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = self._timeout_s
        return connection


def check_master(timeout_s: float) -> str:
    """Call the ROS master and return its URI.

    Raises:
        ConnectFailed: No answer at ``ROS_MASTER_URI``, or not that of a ROS master.
    """
    _call_master(timeout_s, "getPid")
    return _master_uri()


def published_types(timeout_s: float) -> dict[str, str]:
    """Topic to message type (``package/Name``) of all topics that have a publisher.

    Raises:
        ConnectFailed: As ``check_master``.
    """
    return {
        str(topic): str(kind) for topic, kind in _call_master(timeout_s, "getPublishedTopics", "")
    }


def _master_uri() -> str:
    return os.environ.get("ROS_MASTER_URI", DEFAULT_MASTER)


def _call_master(timeout_s: float, method: str, *arguments: str) -> Any:
    """The value that ``method`` of the master returns. Raises as ``check_master``."""
    uri = _master_uri()
    try:
        if not urllib.parse.urlsplit(uri).hostname:
            raise ValueError("got no host in it")
        with xmlrpc.client.ServerProxy(uri, transport=_TimedTransport(timeout_s)) as master:
            answer: Any = getattr(master, method)("/metronome", *arguments)
            code, _, value = answer
    except (
        OSError,
        ValueError,
        xmlrpc.client.Error,
        http.client.HTTPException,
        TypeError,
    ) as error:
        raise ConnectFailed(
            f"no ROS master answers at {uri} within {timeout_s:g} s ({error}): is roscore running, "
            "and ROS_MASTER_URI correct?"
        ) from error
    if code != 1:
        raise ConnectFailed(
            f"the ROS master at {uri} answers {answer} to {method}, expected code 1 (success)"
        )
    return value


def import_ros(name: str) -> Any:
    """Import the module ``name`` of Debian's ROS packages.

    Raises:
        ConnectFailed: It is not installed; names the packages to install.
    """
    if DIST_PACKAGES not in sys.path:
        sys.path.append(DIST_PACKAGES)
    logger_class = logging.getLoggerClass()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConnectFailed(
            f"ROS 1 is not installed ({error}): apt-get install {PACKAGES}"
        ) from error
    finally:
        logging.setLoggerClass(logger_class)


def start_node(name: str, timeout_s: float) -> Any:
    """Start this process's node, unless it runs already, and return the module ``rospy``.

    The node keeps the name of the first call.

    Raises:
        ConnectFailed: No master answers, or ROS is not installed.
    """
    check_master(timeout_s)
    rospy = import_ros("rospy")
    with _lock:
        if not rospy.core.is_initialized():
            root = logging.getLogger()
            handlers, level = list(root.handlers), root.level
            try:
                # No signal handlers: the program has its own. No simulated time: rospy would wait
                # for it. No /rosout: rospy would copy every log of the program there.
                rospy.init_node(
                    name,
                    argv=[name],
                    anonymous=True,
                    disable_signals=True,
                    disable_rostime=True,
                    disable_rosout=True,
                )
            except rospy.ROSException as error:
                raise ConnectFailed(f"ROS node {name!r}: {error}") from error
            finally:
                for handler in [*root.handlers]:
                    root.removeHandler(handler)
                    if handler not in handlers:
                        handler.close()
                for handler in handlers:
                    root.addHandler(handler)
                root.setLevel(level)
                logging.getLogger("rospy").setLevel(logging.WARNING)
            atexit.register(rospy.signal_shutdown, "the process ends")
    if rospy.is_shutdown():
        raise ConnectFailed(
            "this process's ROS node has been shut down and cannot start again: start a new process"
        )
    return rospy


def publisher(rospy: Any, topic: str, kind: Any, *, queue_size: int) -> Any:
    """This process's publisher of ``topic``, which stays registered until the process ends.

    Unregistering one and soon registering another sometimes loses rospy's subscribers: they connect
    while there is none, are rejected and do not connect again.
    """
    with _lock:
        if topic not in _publishers:
            _publishers[topic] = rospy.Publisher(
                topic, kind, queue_size=queue_size, tcp_nodelay=True
            )
        return _publishers[topic]
