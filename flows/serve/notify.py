"""Notifications about failed runs and regressions: an automation that calls the webhook of the environment."""

import os
from datetime import timedelta

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

WEBHOOK = "DEV2PRO_WEBHOOK"  # a URL, such as a Slack or Mattermost one; if unset, nobody is notified
NAME = "dev2pro: failures and regressions"
EVENTS = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "dev2pro.regression"}
BLOCK = "dev2pro-webhook"
TEXT = '"dev2pro: " ~ (event.resource.name or event.resource.id) ~ ": " ~ event.event ~ ". " ~ event.payload.message'
PAYLOAD = f'{{"text": {{{{ ({TEXT}) | replace("<", "(") | tojson }}}}}}'  # tojson escapes quotes; without < Slack reads no <!channel>


def arrange(client: SyncPrefectClient) -> bool:
    """Creates the automation if it does not exist; an operator's changes to it are kept. False if no webhook is set."""
    if not (address := os.environ.get(WEBHOOK)):
        return False
    block = Webhook(method="POST", url=address).save(BLOCK, overwrite=True)
    if not client.read_automations_by_name(NAME):
        trigger = EventTrigger(expect=EVENTS, posture=Posture.Reactive, threshold=1, within=timedelta(0))
        client.create_automation(AutomationCore(name=NAME, trigger=trigger, actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)]))
    return True
