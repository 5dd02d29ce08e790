"""The supervisor's places for front-ends, and calls of one front-end that run in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.child import Child, RestartPolicy
from octavo.ipc import ClusterCall, ClusterReply, FrontendCall


def choose_number(address: str, cores: int, free: int) -> int:
    """How many front-ends serve `address` on so many cores, of which `free` are not the engine's alone."""
    if address.startswith("unix:"):
        return 1
    return min(max(cores // 4, 1), 4, free)


@dataclass(slots=True)
class FrontendSlot:
    """The place of one of the front-ends; processes come and go."""

    index: int
    replaced: int = 0
    child: Child | None = None
    number: int = 0
    """Of the present process: index + frontend_processes * replaced."""
    restarts: RestartPolicy = field(default_factory=RestartPolicy)

    @property
    def name(self) -> str:
        return f"frontend-{self.number}"

    @property
    def ready(self) -> Child | None:
        return self.child if self.child is not None and self.child.ready else None


class ClusterCalls:
    """Calls of one front-end that run in all of them: fans out, gathers, answers."""

    def __init__(self, slots: list[FrontendSlot]) -> None:
        self._slots = slots
        self._next_id = 0
        self._calls: dict[int, _Gathering] = {}
        self._drain: str | None = None
        """Payload of the drain that is in force."""

    def start(self, caller: int, call: ClusterCall) -> None:
        call_id = self._next_id = self._next_id + 1
        if call.method in ("drain", "undrain"):
            self._drain = call.payload if call.method == "drain" else None
        asked = [slot for slot in self._slots if slot.ready is not None]
        asked.sort(key=lambda slot: slot.number != caller)  # the caller's own answer comes first
        gathering = _Gathering(caller, call.call_id, {slot.number: None for slot in asked})
        self._calls[call_id] = gathering
        for slot in asked:
            assert slot.ready is not None
            slot.ready.send(FrontendCall(call_id, call.method, call.payload))
        self._answer_if_complete(call_id)

    def repeat_drain(self, slot: FrontendSlot) -> None:
        """A front-end that comes up while the server drains drains too. Its answer is nobody's."""
        if self._drain is not None and slot.ready is not None:
            self._next_id += 1
            slot.ready.send(FrontendCall(self._next_id, "drain", self._drain))

    def reply(self, frontend: int, call_id: int, payload: str) -> None:
        gathering = self._calls.get(call_id)
        if gathering is not None and frontend in gathering.replies:
            gathering.replies[frontend] = payload
            self._answer_if_complete(call_id)

    def lost(self, frontend: int) -> None:
        """This front-end is gone: nobody waits for its answers, nobody answers it."""
        for call_id, gathering in list(self._calls.items()):
            if gathering.caller == frontend:
                del self._calls[call_id]
            elif gathering.replies.get(frontend, "") is None:
                del gathering.replies[frontend]
                self._answer_if_complete(call_id)

    def _answer_if_complete(self, call_id: int) -> None:
        gathering = self._calls[call_id]
        payloads = [payload for payload in gathering.replies.values() if payload is not None]
        if len(payloads) < len(gathering.replies):
            return
        del self._calls[call_id]
        for slot in self._slots:
            if slot.number == gathering.caller and slot.ready is not None:
                slot.ready.send(ClusterReply(gathering.call_id, payloads))


@dataclass(slots=True)
class _Gathering:
    caller: int
    call_id: int
    """The caller's own."""
    replies: dict[int, str | None]
    """By front-end; None while it has not answered."""
