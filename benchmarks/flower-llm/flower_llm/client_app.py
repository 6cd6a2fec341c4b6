"""The ClientApp: it builds the PEFT model, trains a round's steps, and sends LoRA back."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flower_llm.task import get_model, load_data
from flower_llm.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train on the local texts."""
    config, partition = context.run_config, int(context.node_config["partition-id"])
    told = msg.content["config"]
    model = get_model(config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    batches, rows = load_data(config, partition, int(told["server-round"]))
    loss = train_fn(model, batches, float(told["lr"]), float(config["clip"]))
    metrics = {"train_loss": loss, "num-examples": rows, "partition-id": partition}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=msg)
