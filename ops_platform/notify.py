"""Messages to people over Slack's incoming webhooks (https://api.slack.com/messaging/webhooks). No secrets, no data of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ops_platform.errors import AccessDeniedError, OpsError, UnreachableError

if TYPE_CHECKING:
    from ops_platform.inventory.model import Inventory
    from ops_platform.inventory.values import Secret

_TIMEOUT = 10.0
_MOST = 2900  # characters of one block of text; Slack takes 3000


def run_failed(
    inventory: Inventory, job: str, run_id: str, target_id: str | None, reasons: Sequence[str]
) -> dict[str, Any]:
    """What a tired person needs: what failed, for whom, why, and where to look."""
    owner = None
    if target_id is not None:
        target = next((t for t in inventory.targets if t.id == target_id), None)
        owner = inventory.owners[target.owner] if target else None
    head = f"{job} failed for {target_id}" if target_id else f"{job} failed"
    why = (
        "\n".join(dict.fromkeys(reason for reason in reasons if reason)) or "the run was ended before it could say why"
    )
    lines = [f"*{escape(head)}*", escape(why[:_MOST])]
    if owner is not None and owner.slack:
        lines.append(f"owner: {escape(owner.name)} {escape(owner.slack)}")
    lines.append(f"run `{run_id}`")
    return {"text": head, "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": "\n".join(lines)[:_MOST]}}]}


def escape(text: str) -> str:
    """Slack's three control characters."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def post(webhook: Secret, message: dict[str, Any]) -> None:
    """Send it. The webhook's address is a secret: no error names it."""
    import urllib3

    try:
        answer = urllib3.request(
            "POST", webhook.reveal(), json=message, timeout=_TIMEOUT, retries=urllib3.Retry(2, redirect=False)
        )
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(
            f"Slack does not answer ({type(error).__name__})", where="platform.slack.webhook"
        ) from None
    if answer.status in (403, 404, 410):
        raise AccessDeniedError(
            f"Slack refuses the webhook ({answer.status} {answer.data.decode(errors='replace')[:100]})",
            where="platform.slack.webhook", remedy="make a new webhook, and put its address into the secret",
        )  # fmt: skip
    if answer.status != 200:
        raise OpsError(
            f"Slack answered {answer.status} {answer.data.decode(errors='replace')[:100]}",
            where="platform.slack.webhook",
        )
