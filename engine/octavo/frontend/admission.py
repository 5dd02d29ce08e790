"""How much work one front-end may hold: sequences in flight, in all and per tenant, and waiting prompt tokens."""

from __future__ import annotations

from octavo.config import ServerConfig
from octavo.errors import Reason, RequestError
from octavo.frontend.failures import failure


class Admission:
    """Counts the places of one front-end, which has its share of the server's. All or nothing."""

    def __init__(self, config: ServerConfig) -> None:
        def share(limit: int) -> int:
            return max(1, limit // config.frontend_processes)

        self.max_sequences = share(config.limits.max_inflight_requests)
        self.max_tenant_sequences = share(config.limits.max_tenant_requests)
        self.max_waiting_tokens = share(config.limits.max_waiting_tokens)
        self.num_sequences = 0
        self._of_tenant: dict[str, int] = {}

    def acquire(self, tenant: str, num_sequences: int) -> None:
        """Takes places. Raises RequestError: QUEUE_FULL, TENANT_LIMIT; REQUEST_TOO_LARGE if an idle server would not
        have so many."""
        most = min(self.max_sequences, self.max_tenant_sequences) if tenant else self.max_sequences
        if num_sequences > most:
            raise RequestError(
                Reason.REQUEST_TOO_LARGE,
                f"the request has {num_sequences} sequences, the server takes {most} at once",
                metadata={"max": str(most), "got": str(num_sequences)},
            )
        if self.num_sequences + num_sequences > self.max_sequences:
            raise failure(Reason.QUEUE_FULL)
        of_tenant = self._of_tenant.get(tenant, 0) + num_sequences
        if tenant and of_tenant > self.max_tenant_sequences:
            raise failure(Reason.TENANT_LIMIT)
        self.num_sequences += num_sequences
        self._of_tenant[tenant] = of_tenant

    def release(self, tenant: str, num_sequences: int) -> None:
        """Gives places back."""
        self.num_sequences -= num_sequences
        self._of_tenant[tenant] -= num_sequences
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]
        assert self.num_sequences >= 0, "places were given back twice"

    def check_tokens(self, waiting: int, new: int) -> None:
        """Raises RequestError TOKENS_FULL if prompts of `new` tokens cannot join `waiting` ones.

        When nothing waits, any legal request is taken, however small this front-end's share.
        """
        if waiting and waiting + new > self.max_waiting_tokens:
            raise failure(Reason.TOKENS_FULL)
