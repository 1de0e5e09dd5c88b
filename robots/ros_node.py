"""ROS 1 for a driver: a node of this process, without what rospy does to a program around it.

rospy is imported here and nowhere else, on first use. Debian's packages lie outside a virtual
environment; their folder is *appended* to ``sys.path``, so that nothing of ours is replaced by
theirs. ``rospy.init_node`` waits for ever where no master answers, so the master is asked first;
it also replaces the root logger's handlers, which are put back.

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
    """The URI of the master, which has just answered.

    Raises:
        ConnectFailed: Nobody answers at ``ROS_MASTER_URI``, or not like a master.
    """
    _ask_master(timeout_s, "getPid")
    return _master_uri()


def published_types(timeout_s: float) -> dict[str, str]:
    """Topic, as the master calls it, to ``package/Name``, of all that somebody publishes.

    Raises:
        ConnectFailed: As ``check_master``.
    """
    return {
        str(topic): str(kind) for topic, kind in _ask_master(timeout_s, "getPublishedTopics", "")
    }


def _master_uri() -> str:
    return os.environ.get("ROS_MASTER_URI", DEFAULT_MASTER)


def _ask_master(timeout_s: float, method: str, *arguments: str) -> Any:
    """What it answers. Raises as ``check_master``."""
    uri = _master_uri()
    try:
        if not urllib.parse.urlsplit(uri).hostname:
            raise ValueError("it names no host")
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
            "and ROS_MASTER_URI right?"
        ) from error
    if code != 1:
        raise ConnectFailed(f"the ROS master at {uri} answers {answer}, expected a success")
    return value


def import_ros(name: str) -> Any:
    """The module ``name`` of Debian's ROS.

    Raises:
        ConnectFailed: It is not installed; says what to install.
    """
    if DIST_PACKAGES not in sys.path:
        sys.path.append(DIST_PACKAGES)
    kind = logging.getLoggerClass()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConnectFailed(
            f"ROS 1 is not installed ({error}): apt-get install {PACKAGES}"
        ) from error
    finally:
        logging.setLoggerClass(kind)


def start_node(name: str, timeout_s: float) -> Any:
    """``rospy``, with this process's node running; ``name`` is that of the first call.

    Raises:
        ConnectFailed: No master, or no ROS here.
    """
    check_master(timeout_s)
    rospy = import_ros("rospy")
    with _lock:
        if not rospy.core.is_initialized():
            root = logging.getLogger()
            handlers, level = list(root.handlers), root.level
            try:
                # No signal handlers, which are the program's; no simulated time, for which rospy
                # would wait; no /rosout, into which it would copy every log of the program.
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
        raise ConnectFailed("this process's ROS node has been shut down and cannot start again")
    return rospy


def publisher(rospy: Any, topic: str, kind: Any, *, queue_size: int) -> Any:
    """This process's publisher of ``topic``, which stays registered until the process ends.

    Unregistering one and registering another soon after makes rospy's subscribers miss it now and
    then: they dial while there is none, are turned away and do not dial again.
    """
    with _lock:
        if topic not in _publishers:
            _publishers[topic] = rospy.Publisher(
                topic, kind, queue_size=queue_size, tcp_nodelay=True
            )
        return _publishers[topic]
