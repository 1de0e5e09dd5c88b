"""Servos on a serial bus that outlive whoever drives them: ``python servo_bus.py KIND LOG``.

A pseudo-terminal whose other end LeRobot opens as its port, with the vendor's own SDK. KIND is
``feetech`` (protocol 0, STS3215) or ``dynamixel`` (protocol 2.0, XL430 and XL330). Prints the port.

LOG gets one line of JSON per write that matters: time, register, motor, value, and where that motor
was. A motor with torque moves to its goal at a bounded speed; one without falls. Written from the
vendors' published protocols and control tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import queue
import select
import signal
import sys
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

MOVES = 2000.0
"""Ticks per second, with torque."""
FALLS = 300.0
"""Ticks per second, without."""
MIDDLE, LOWEST, HIGHEST, FLOOR = 2047, 700, 3394, 900


class Feetech:
    """Addresses and packets. Two bytes are the lower first."""

    ids = range(1, 10)
    width = 2
    torque, position_goal, velocity_goal, present, velocity = 40, 42, 46, 56, 58
    mode, velocity_mode = 33, 1

    @staticmethod
    def registers(_: int) -> dict[int, bytes]:
        return {
            0: bytes([3, 10]),
            3: (777).to_bytes(2, "little"),
            9: LOWEST.to_bytes(2, "little"),
            11: HIGHEST.to_bytes(2, "little"),
        }

    @staticmethod
    def packets(buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
        while (at := buffer.find(b"\xff\xff")) >= 0 and len(buffer) >= at + 6:
            ident, length = buffer[at + 2], buffer[at + 3]
            if ident == 0xFF or not 2 <= length < 250:
                del buffer[: at + 1]
                continue
            end = at + 4 + length
            if len(buffer) < end:
                return
            body = bytes(buffer[at + 2 : end])
            if ~sum(body[:-1]) & 0xFF != body[-1]:
                del buffer[: at + 1]  # somebody was killed within a packet
                continue
            del buffer[:end]
            yield ident, body[2], body[3:-1]

    @staticmethod
    def status(ident: int, data: bytes) -> bytes:
        body = bytes([ident, len(data) + 2, 0]) + data
        return b"\xff\xff" + body + bytes([~sum(body) & 0xFF])

    @staticmethod
    def ping(_: bytearray) -> bytes:
        return b""


class Dynamixel:
    """Addresses and packets. Four bytes are the lower first."""

    ids = range(1, 7)
    width = 4
    torque, position_goal, velocity_goal, present, velocity = 64, 116, 104, 132, 128
    mode, velocity_mode = 11, 1

    @staticmethod
    def registers(ident: int) -> dict[int, bytes]:
        return {
            0: (1060 if ident < 3 else 1200).to_bytes(2, "little"),
            6: bytes([50]),
            48: HIGHEST.to_bytes(4, "little"),
            52: LOWEST.to_bytes(4, "little"),
        }

    @classmethod
    def packets(cls, buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
        while (at := buffer.find(b"\xff\xff\xfd\x00")) >= 0 and len(buffer) >= at + 10:
            length = int.from_bytes(buffer[at + 5 : at + 7], "little")
            end = at + 7 + length
            if not 3 <= length < 250:
                del buffer[: at + 1]
                continue
            if len(buffer) < end:
                return
            packet = bytes(buffer[at:end])
            if cls.crc(packet[:-2]) != int.from_bytes(packet[-2:], "little"):
                del buffer[: at + 1]
                continue
            del buffer[:end]
            yield packet[4], packet[7], packet[8:-2].replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd")

    @classmethod
    def status(cls, ident: int, data: bytes) -> bytes:
        body = b"\x55\x00" + data
        packet = b"\xff\xff\xfd\x00" + bytes([ident])
        packet += (len(body) + 2).to_bytes(2, "little") + body
        return packet + cls.crc(packet).to_bytes(2, "little")

    @staticmethod
    def ping(registers: bytearray) -> bytes:
        return bytes(registers[0:2]) + bytes(registers[6:7])

    @staticmethod
    def crc(data: bytes) -> int:
        value = 0
        for byte in data:
            value ^= byte << 8
            for _ in range(8):
                value = (value << 1 ^ (0x8005 if value & 0x8000 else 0)) & 0xFFFF
        return value


PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 0x01, 0x02, 0x03, 0x82, 0x83
BROADCAST = 0xFE


class Motor:
    def __init__(self, kind: type[Feetech] | type[Dynamixel], ident: int) -> None:
        self._kind, self.ident = kind, ident
        self.registers = bytearray(256)
        for address, data in kind.registers(ident).items():
            self.registers[address : address + len(data)] = data
        self.at = float(MIDDLE)
        self.set(kind.present, MIDDLE)

    def get(self, address: int) -> int:
        return int.from_bytes(self.registers[address : address + self._kind.width], "little")

    def set(self, address: int, value: int) -> None:
        data = value.to_bytes(self._kind.width, "little")
        self.registers[address : address + len(data)] = data

    def move(self, elapsed_s: float) -> None:
        kind = self._kind
        if self.registers[kind.mode] == kind.velocity_mode:
            speed = self.get(kind.velocity_goal) if self.registers[kind.torque] else 0
            self.set(kind.velocity, speed)
            return
        if self.registers[kind.torque]:
            way = self.get(kind.position_goal) - self.at
            most = MOVES * elapsed_s
            self.at += max(-most, min(most, way))
        else:
            self.at = max(FLOOR, self.at - FALLS * elapsed_s)
        self.set(kind.present, round(self.at))


class Bus:
    def __init__(self, kind: type[Feetech] | type[Dynamixel], log: str) -> None:
        self._kind = kind
        self._motors = {ident: Motor(kind, ident) for ident in kind.ids}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._write_down, args=(log,), daemon=True).start()
        self._master, other = pty.openpty()
        tty.setraw(self._master)
        tty.setraw(other)
        self.port = os.ttyname(other)
        self._names = {
            kind.torque: "torque",
            kind.position_goal: "goal",
            kind.velocity_goal: "speed",
        }

    def run(self) -> None:
        buffer, then_s = bytearray(), time.monotonic()
        while True:
            if select.select([self._master], [], [], 0.005)[0]:
                buffer += os.read(self._master, 4096)
            now_s = time.monotonic()
            for motor in self._motors.values():
                motor.move(now_s - then_s)
            then_s = now_s
            answer = b"".join(self._do(*packet) for packet in list(self._kind.packets(buffer)))
            if answer:
                os.write(self._master, answer)

    def _do(self, ident: int, instruction: int, data: bytes) -> bytes:
        kind, wide = self._kind, self._kind is Dynamixel
        size = 2 if wide else 1
        if instruction in (SYNC_READ, SYNC_WRITE):
            address = int.from_bytes(data[:size], "little")
            length = int.from_bytes(data[size : 2 * size], "little")
            rest = data[2 * size :]
            if instruction == SYNC_READ:
                return b"".join(
                    kind.status(one, bytes(self._motors[one].registers[address : address + length]))
                    for one in rest
                )
            for at in range(0, len(rest), length + 1):
                self._write(rest[at], address, rest[at + 1 : at + 1 + length])
            return b""
        if ident not in self._motors:
            return b""
        registers = self._motors[ident].registers
        if instruction == PING:
            return kind.status(ident, kind.ping(registers))
        address = int.from_bytes(data[:size], "little")
        if instruction == READ:
            length = int.from_bytes(data[size : 2 * size], "little")
            return kind.status(ident, bytes(registers[address : address + length]))
        if instruction == WRITE:
            self._write(ident, address, data[size:])
        return kind.status(ident, b"")

    def _write(self, ident: int, address: int, data: bytes) -> None:
        motor = self._motors[ident]
        motor.registers[address : address + len(data)] = data
        if (name := self._names.get(address)) is not None:
            value = int.from_bytes(data, "little")
            line = [time.monotonic(), name, ident, value, round(motor.at)]
            self._lines.put(json.dumps(line) + "\n")

    def _write_down(self, log: str) -> None:
        """In a thread: a disk may take its time, a servo may not."""
        with Path(log).open("a", buffering=1) as file:
            while True:
                file.write(self._lines.get())


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):
        os.nice(-15)  # real servos answer within a millisecond, whatever the machine does
    bus = Bus({"feetech": Feetech, "dynamixel": Dynamixel}[sys.argv[1]], sys.argv[2])
    sys.stdout.write(bus.port + "\n")
    sys.stdout.flush()
    bus.run()


if __name__ == "__main__":
    main()
