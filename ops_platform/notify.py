"""Messages to people over Slack's incoming webhooks (https://api.slack.com/messaging/webhooks). No secrets, no data of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ops_platform.clients.slack import escape, fitting
from ops_platform.clock import SYSTEM_CLOCK, Clock
from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError, UsageError

if TYPE_CHECKING:
    from ops_platform.inventory.model import Inventory
    from ops_platform.inventory.values import Secret, SecretRef

_WHERE = "platform.slack.webhook"
_TIMEOUT = 10.0
_MOST = 2400  # characters of the reason; Slack takes 3000 in one block of text
_TRIES = 3
_LONGEST_WAIT = 15.0  # seconds: a sensor's tick is ended after 60


def run_failed(
    inventory: Inventory, job: str, run_id: str, target_id: str | None, reasons: Sequence[str]
) -> dict[str, Any]:
    """What a tired person needs: what failed, for whom, why, and where to look."""
    owner = None
    if target_id is not None:
        target = next((t for t in inventory.targets if t.id == target_id), None)
        owner = inventory.owners[target.owner] if target else None
    head = escape(f"{job} failed for {target_id}" if target_id else f"{job} failed")
    why = (
        "\n".join(dict.fromkeys(reason for reason in reasons if reason)) or "the run was ended before it could say why"
    )
    lines = [f"*{head}*", fitting(why, _MOST)]
    if owner is not None:
        lines.append(f"owner: {escape(' '.join(filter(None, [owner.name, owner.slack])))}")
    lines.append(f"run `{run_id}`")
    return {"text": head, "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": "\n".join(lines)}}]}


def post(webhook: Secret, message: dict[str, Any], clock: Clock = SYSTEM_CLOCK, *, ref: SecretRef) -> None:
    """Send it, again where Slack says "later" or does not answer. The webhook's address is a secret: errors name `ref`, where it stands."""
    for attempt in range(1, _TRIES + 1):
        try:
            _send(webhook, message, f"{_WHERE} ({ref})")
        except _LaterError as later:
            if attempt == _TRIES:
                raise
            clock.sleep(min(later.wait, _LONGEST_WAIT))
        else:
            return


class _LaterError(UnreachableError):
    """What another try may mend, after `wait` seconds."""

    wait = 1.0


def _send(webhook: Secret, message: dict[str, Any], where: str) -> None:
    import urllib3

    try:
        answer = urllib3.request("POST", webhook.reveal(), json=message, timeout=_TIMEOUT, retries=False)
    except urllib3.exceptions.LocationValueError:
        raise UsageError(
            "this is no address of a webhook", where=where, remedy="put https://hooks.slack.com/… into it"
        ) from None
    except urllib3.exceptions.HTTPError as error:
        raise _LaterError(f"Slack does not answer ({type(error).__name__})", where=where) from None
    said = f"{answer.status} {answer.data.decode(errors='replace')[:100]}".replace(webhook.reveal(), "***")
    if answer.status in (403, 404, 410):
        raise AccessDeniedError(
            f"Slack refuses the webhook ({said})", where=where,
            remedy="make a new webhook, and put its address into the secret",
        )  # fmt: skip
    if answer.status == 429 or answer.status >= 500:
        error = _LaterError(f"Slack answered {said}", where=where)
        asked = answer.headers.get("Retry-After", "")
        error.wait = float(asked) if asked.isdecimal() else error.wait
        raise error
    if answer.status != 200:
        raise OpsError(f"Slack answered {said}", where=where)
