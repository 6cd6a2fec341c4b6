"""A node that sends back as many other bytes: what the other end has already, Flower does not send."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """An array of the same size."""
    size = len(message.content.array_records["array"]["packed"].numpy())
    array = Array(np.random.default_rng().integers(0, 256, size, dtype=np.uint8))
    return Message(RecordDict({"array": ArrayRecord({"packed": array})}), reply_to=message)
