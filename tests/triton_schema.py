"""inference.ModelConfig, the published schema of Triton's config.pbtxt, as far as an export may use it.

Fields are (number, type), "*" where repeated, "map" where text keys lead to messages.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

ENUMS = {
    "DataType": "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16",
    "Kind": "AUTO GPU CPU MODEL",
}
PREFIXES = {"DataType": "TYPE_", "Kind": "KIND_"}
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "ModelTensorReshape": {"shape": (1, "*int64")},
    "ModelInput": {
        "name": (1, "string"), "data_type": (2, "DataType"), "dims": (4, "*int64"),
        "reshape": (5, "ModelTensorReshape"), "is_shape_tensor": (6, "bool"), "allow_ragged_batch": (7, "bool"),
        "optional": (8, "bool"),
    },
    "ModelOutput": {
        "name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "*int64"), "label_filename": (4, "string"),
        "reshape": (5, "ModelTensorReshape"),
    },
    "ModelInstanceGroup": {"name": (1, "string"), "count": (2, "int32"), "gpus": (3, "*int32"), "kind": (4, "Kind")},
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "*int32"), "max_queue_delay_microseconds": (2, "uint64"),
        "preserve_ordering": (3, "bool"),
    },
    "ModelParameter": {"string_value": (1, "string")},
    "WarmupInput": {
        "data_type": (1, "DataType"), "dims": (2, "*int64"), "zero_data": (3, "bool"), "random_data": (4, "bool"),
        "input_data_file": (5, "string"),
    },
    "ModelWarmup": {
        "name": (1, "string"), "batch_size": (2, "uint32"), "inputs": (3, "map WarmupInput"), "count": (4, "uint32"),
    },
    "ModelConfig": {
        "name": (1, "string"), "platform": (2, "string"), "max_batch_size": (4, "int32"), "input": (5, "*ModelInput"),
        "output": (6, "*ModelOutput"), "instance_group": (7, "*ModelInstanceGroup"),
        "default_model_filename": (8, "string"), "dynamic_batching": (11, "ModelDynamicBatching"),
        "parameters": (14, "map ModelParameter"), "model_warmup": (16, "*ModelWarmup"), "backend": (17, "string"),
    },
}  # fmt: skip
ONEOFS = {"WarmupInput": ("input_data_type", ("zero_data", "random_data", "input_data_file"))}


def describe(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    """Add one field to a message."""
    Field = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=number, label=Field.LABEL_OPTIONAL)
    if kind.startswith("map "):
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        describe(entry, "key", 1, "string")
        describe(entry, "value", 2, kind.removeprefix("map "))
        field.label, field.type, field.type_name = Field.LABEL_REPEATED, Field.TYPE_MESSAGE, entry.name
        return
    if kind.startswith("*"):
        field.label = Field.LABEL_REPEATED
    kind = kind.removeprefix("*")
    if kind in MESSAGES or kind in ENUMS:
        field.type = Field.TYPE_MESSAGE if kind in MESSAGES else Field.TYPE_ENUM
        field.type_name = f".inference.{kind}"
    else:
        field.type = getattr(Field, f"TYPE_{kind.upper()}")


def model_config() -> Any:
    """The class inference.ModelConfig."""
    file = descriptor_pb2.FileDescriptorProto(name="config", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=PREFIXES[name] + value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            describe(message, field, number, kind)
        if name in ONEOFS:
            message.oneof_decl.add(name=ONEOFS[name][0])
            for field in message.field:
                if field.name in ONEOFS[name][1]:
                    field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


MODEL_CONFIG = model_config()


def type_name(number: int) -> str:
    return f"TYPE_{ENUMS['DataType'].split()[number]}"
