"""Send an e-mail for every order, over a server that can be broken."""

from functools import cache
from typing import Annotated
from uuid import UUID

import anyio
from fastapi import Depends

from eventbus import Module, Retry
from shop.messages import EmailSent, OrderPlaced, SwitchEmail

notifications = Module("notifications", messages=[EmailSent])


class MailServer:
    """Keep what was sent, and refuse to send while broken."""

    def __init__(self) -> None:
        self.works = True
        self.refused = 0
        self._sent: dict[UUID, str] = {}

    async def send(self, order_id: UUID, customer: str) -> None:
        if not self.works:
            self.refused += 1
            raise ConnectionRefusedError("the mail server refuses connections")
        await anyio.sleep(0.3)
        self._sent[order_id] = customer

    async def count(self) -> int:
        return len(self._sent)


@cache
def get_mail() -> MailServer:
    return MailServer()


Mail = Annotated[MailServer, Depends(get_mail)]


@notifications.on(OrderPlaced, retry=Retry(attempts=3, initial=0.5))
async def send_email(event: OrderPlaced, mail: Mail) -> EmailSent:
    await mail.send(event.order_id, event.customer)
    return EmailSent(order_id=event.order_id)


@notifications.handles(SwitchEmail)
async def switch_email(cmd: SwitchEmail, mail: Mail) -> None:
    mail.works = cmd.works
