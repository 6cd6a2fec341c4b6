"""The ClientApp: it builds the PEFT model, loads its data, trains, and sends LoRA and head back."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from fedavg_lora.task import clocked, get_model, load_data
from fedavg_lora.task import test as test_fn
from fedavg_lora.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train on the local texts."""
    config, partition = context.run_config, int(context.node_config["partition-id"])
    took: dict[str, float] = {}
    with clocked(took, "seconds-model"):
        model = get_model(config)
        set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    with clocked(took, "seconds-data"):
        loader, rows = load_data(config, partition, int(msg.content["config"]["server-round"]))
    with clocked(took, "seconds-train"):
        loss = train_fn(model, loader, int(config["local-epochs"]), msg.content["config"]["lr"], float(config["clip"]))
    metrics = {"train_loss": loss, "num-examples": rows, "partition-id": partition, **took}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the aggregate on the local texts."""
    config, partition = context.run_config, int(context.node_config["partition-id"])
    model = get_model(config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    loader, rows = load_data(config, partition, 0, "validation_")
    loss, accuracy = test_fn(model, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": rows}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
