"""Send an e-mail for every order, over a server that can be broken."""

from eventbus import EventBus, Module, Retry
from shop.database import Tx
from shop.messages import EmailSent, OrderPlaced, SwitchEmail
from shop.pace import pause

notifications = Module("notifications", messages=[EmailSent])


@notifications.on(OrderPlaced, retry=Retry(attempts=3, initial=0.5))
async def send_email(event: OrderPlaced, bus: EventBus) -> EmailSent:
    """Send without a transaction: who is killed between sending and being done will send once more."""
    await hand_over(event, bus)
    await pause(0.3)  # until the mail server has said yes
    return EmailSent(order_id=event.order_id)


@notifications.handles(SwitchEmail)
async def switch_email(cmd: SwitchEmail, tx: Tx) -> None:
    await tx.session.execute("UPDATE mail_server SET works = ?", [cmd.works])


async def hand_over(event: OrderPlaced, bus: EventBus) -> None:
    """Be the mail server, which is somebody else's: what it has taken is out, whatever becomes of the sender."""
    async with bus.transaction() as tx:
        works = await tx.session.fetchone("SELECT 1 FROM mail_server WHERE works")
        if works:
            await tx.session.execute("INSERT INTO emails VALUES (?, ?)", [str(event.order_id), event.customer])
        else:
            await tx.session.execute("UPDATE mail_server SET refused = refused + 1")
    if not works:
        raise ConnectionRefusedError("the mail server refuses connections")
