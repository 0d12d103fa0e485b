"""What no program in a sandbox may ask of the kernel, as a filter in the kernel's own form (seccomp's BPF).

Refused are namespaces inside the sandbox's own, memory that no process and no file shows, and sockets of kinds that a
network namespace does not hold: vsock, for one, leads from a virtual machine to its host.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from forgejax.errors import ConfigError

_LOAD, _EQUAL, _GREATER, _AT_LEAST, _SHARES, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06  # operations
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000  # what a filter returns; with the errno
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # where they lie in what it is asked about
_X32 = 0x40000000
_NAMESPACES = 0x7E020000  # flags of clone(2) and, with that of time, of unshare(2)
_TIME_NAMESPACE = 0x80
_FAMILIES = (1, 2, 10, 16)  # of sockets: unix, IPv4, IPv6, netlink
_SHARED_BYTES = 64 * 1024  # of System V, which some databases want a little of

_Instruction = tuple[int, int, int, int]  # operation, jumps where it holds and where not, value


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """How a kind of machine is known in a filter, and its numbers of the calls that differ."""

    audit: int
    calls: dict[str, int]


_MACHINES = {
    "x86_64": _Machine(
        audit=0xC000003E,
        calls={
            "clone": 56,
            "unshare": 272,
            "setns": 308,
            "memfd_create": 319,
            "shmget": 29,
            "msgget": 68,
            "socket": 41,
        },
    ),
    "aarch64": _Machine(
        audit=0xC00000B7,
        calls={
            "clone": 220,
            "unshare": 97,
            "setns": 268,
            "memfd_create": 279,
            "shmget": 194,
            "msgget": 186,
            "socket": 198,
        },
    ),
}
_IO_URING_SETUP, _CLONE3, _MEMFD_SECRET = 425, 435, 447  # the same everywhere


def make_filter() -> bytes:
    """The filter for this machine. Raises ConfigError for a kind that it is not known for."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise ConfigError(
            f"sandboxes are made on machines of the kinds {', '.join(_MACHINES)}, and this is {platform.machine()}; "
            'set tasks.sandbox.kind = "none" for agents that you trust with all that this process may do'
        )
    call = machine.calls
    program = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, machine.audit),
        _refuse(errno.ENOSYS),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _refuse(errno.ENOSYS),
        *_refuse_flags(call["clone"], _NAMESPACES),
        *_refuse_flags(call["unshare"], _NAMESPACES | _TIME_NAMESPACE),
        *_refuse_call(call["setns"], errno.EPERM),
        *_refuse_call(_CLONE3, errno.ENOSYS),  # its flags lie in memory; who gets this answer calls clone
        *_refuse_call(call["memfd_create"], errno.ENOSYS),
        *_refuse_call(_MEMFD_SECRET, errno.ENOSYS),
        *_refuse_call(_IO_URING_SETUP, errno.ENOSYS),
        *_refuse_call(call["msgget"], errno.ENOSYS),
        *_refuse_more(call["shmget"], _SHARED_BYTES),
        *_refuse_families(call["socket"]),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _refuse(number: int) -> _Instruction:
    return (_RETURN, 0, 0, _REFUSE | number)


def _load_argument(index: int, *, high: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * high)


def _refuse_call(call: int, number: int) -> tuple[_Instruction, ...]:
    return ((_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, 1, call), _refuse(number))


def _refuse_flags(call: int, flags: int) -> tuple[_Instruction, ...]:
    """The call where its first argument has one of ``flags``."""
    return (
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 3, call),
        _load_argument(0),
        (_SHARES, 0, 1, flags),
        _refuse(errno.EPERM),
    )


def _refuse_more(call: int, most: int) -> tuple[_Instruction, ...]:
    """The call where its second argument is above ``most``."""
    return (
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 5, call),
        _load_argument(1, high=True),
        (_EQUAL, 0, 2, 0),
        _load_argument(1),
        (_GREATER, 0, 1, most),
        _refuse(errno.EINVAL),
    )


def _refuse_families(call: int) -> tuple[_Instruction, ...]:
    """A socket of a family that is not among ``_FAMILIES``."""
    kept = [(_EQUAL, len(_FAMILIES) - index, 0, family) for index, family in enumerate(_FAMILIES)]
    return (
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 2 + len(kept), call),
        _load_argument(0),
        *kept,
        _refuse(errno.EAFNOSUPPORT),
    )
