"""A node that sends back what it got."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """The same array again."""
    return Message(RecordDict({"array": message.content["array"]}), reply_to=message)
