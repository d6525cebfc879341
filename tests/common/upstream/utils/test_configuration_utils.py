"""Fields that every configuration takes, each with a value that is not its default."""

config_common_kwargs = {
    "architectures": ["ScratchForSequenceClassification"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "is_encoder_decoder": True,
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "multi_label_classification",
    "return_dict": False,
}
