"""The background job that asks a provider about each picture of an order.

Guarantee: started over (a restart, a lost worker), it goes on with the pictures that still wait; what was recorded is
neither asked for nor paid for again. Requests are spread by the order's limit; after "too many" nobody is asked until
the provider's own Retry-After is over. A few requests are under way at a time; this thread alone writes to the
database, beats, and hears of a cancel.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from datasets.captioning import recording
from datasets.captioning.asking import Asker, Busy
from datasets.captioning.enums import Captioner, Proposal
from datasets.captioning.options import filled_prompt
from datasets.captioning.providers import Answer, PictureDeclined, ProviderError, RequestRefused
from datasets.captioning.shrinking import as_jpeg
from datasets.models import Captioning, CaptionProposal
from datasets.pictures import picture_path
from lorapilot import jobs
from lorapilot.errors import Missing, UserError

REQUESTS_AT_ONCE = 4
PAUSES = (2, 5, 15, 30, 60)  # seconds before another try for a picture
MOST_REFUSALS = 5  # of pictures in a row, without a caption in between: then it is not the pictures
LOOK_SECONDS = 1.0


@jobs.job
def caption_remotely(progress: Callable[..., None], *, captioning_id: int) -> dict[str, Any]:
    """Ends with how many captions were proposed and how many pictures failed. Raises UserError when it makes no sense
    to go on."""
    captioning = Captioning.objects.select_related("dataset", "owner").filter(pk=captioning_id).first()
    if captioning is None:
        raise Missing("The dataset was deleted meanwhile.")
    _Round(captioning, progress).work()
    counts = captioning.proposals
    return {
        "proposed": counts.filter(state=Proposal.PROPOSED).count(),
        "failed": counts.filter(state=Proposal.FAILED).count(),
    }


class _Round:
    """One go through the pictures that wait."""

    def __init__(self, captioning: Captioning, progress: Callable[..., None]) -> None:
        self.captioning = captioning
        self.progress = progress
        self.provider = recording.provider_in_name_of(
            captioning.owner, Captioner(captioning.captioner), captioning.model
        )
        self.asker = Asker(self.provider)
        self.prompt = filled_prompt(captioning.options["prompt"], captioning.dataset.trigger_word)
        waiting = captioning.proposals.filter(state=Proposal.WAITING).order_by("pk")
        self.waiting = deque(waiting.values_list("pk", flat=True))
        self.total = captioning.proposals.count()
        self.tries: dict[int, int] = {}
        self.flying: dict[Future[Answer], int] = {}
        self.next_at = 0.0
        self.message = ""
        self.refused_in_a_row = 0

    def work(self) -> None:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="captions") as pool:
            try:
                while self.waiting or self.flying:
                    self._tell()
                    self._send_off(pool)
                    self._collect()
            except BaseException:
                self.asker.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _tell(self) -> None:
        left = len(self.waiting) + len(self.flying)
        self.progress(self.total - left, self.total, self.message)

    def _send_off(self, pool: ThreadPoolExecutor) -> None:
        while self.waiting and len(self.flying) < REQUESTS_AT_ONCE and time.monotonic() >= self.next_at:
            pk = self.waiting.popleft()
            picture = self._picture_of(pk)
            if picture is None:
                continue
            self.flying[pool.submit(self._ask, *picture)] = pk
            seconds = 60 / self.captioning.options["requests_per_minute"]
            self.next_at = max(time.monotonic(), self.next_at) + seconds

    def _picture_of(self, pk: int) -> tuple[str, str] | None:
        """Hash and ending of its file; None when there is nothing to do for it (any more)."""
        proposal = CaptionProposal.objects.select_related("picture").filter(pk=pk, state=Proposal.WAITING).first()
        if proposal is None:
            return None
        if proposal.picture.caption and not self.captioning.overwrite:
            recording.skip(self._proposal(pk))
            return None
        return proposal.picture.sha256, proposal.picture.extension

    def _ask(self, sha256: str, extension: str) -> Answer:
        """In a thread of its own: no database here."""
        jpeg = as_jpeg(picture_path(sha256, extension), pixels=self.captioning.options["pixels"])
        return self.asker.ask(self.prompt, jpeg, self.captioning.options["max_tokens"])

    def _collect(self) -> None:
        """Wait for answers, a second at most, and record those that have come."""
        pause = min(LOOK_SECONDS, max(0.0, self.next_at - time.monotonic())) if self.waiting else LOOK_SECONDS
        if not self.flying:
            time.sleep(pause)
            return
        full = len(self.flying) >= REQUESTS_AT_ONCE
        done, _ = wait(self.flying, timeout=LOOK_SECONDS if full else pause, return_when=FIRST_COMPLETED)
        for future in done:
            self._record(self.flying.pop(future), future)

    def _record(self, pk: int, future: Future[Answer]) -> None:
        try:
            answer = future.result()
        except Busy as busy:
            self._try_again(pk, busy)
        except PictureDeclined as declined:
            used = {"input_tokens": declined.input_tokens, "output_tokens": declined.output_tokens}
            self._fail(pk, declined.message, **used)
            self._count(declined.message if isinstance(declined, RequestRefused) else "")
        except ProviderError:
            raise
        except UserError as error:
            self._fail(pk, error.message)
        else:
            recording.record_caption(self._proposal(pk), answer)
            self._count("")
            self.message = ""

    def _try_again(self, pk: int, busy: Busy) -> None:
        tries = self.tries[pk] = self.tries.get(pk, 0) + 1
        if tries > len(PAUSES):
            self._fail(pk, f"{busy} Gave up after {tries} tries.")
            self._count(str(busy))
            return
        self.waiting.append(pk)
        seconds = PAUSES[tries - 1] if busy.after_seconds is None else busy.after_seconds
        self.next_at = max(self.next_at, time.monotonic() + seconds)
        self.message = f"{busy} Asks again in {seconds:.0f} s."

    def _fail(self, pk: int, reason: str, **used: int) -> None:
        recording.record_failure(self._proposal(pk), reason, **used)

    def _count(self, refused: str) -> None:
        """`refused`: why the provider did not answer at all; empty when it did, be it with no."""
        self.refused_in_a_row = self.refused_in_a_row + 1 if refused else 0
        if self.refused_in_a_row >= MOST_REFUSALS:
            raise ProviderError(f"{MOST_REFUSALS} pictures failed in a row, the last one so: {refused}")

    def _proposal(self, pk: int) -> Any:
        return CaptionProposal.objects.filter(pk=pk)
