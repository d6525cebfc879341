"""The scratch model written a second time, for reading: one row at a time, loops over heads and positions."""

from __future__ import annotations

import math

import torch


def norm(states: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides each vector by its root mean square."""
    return states / torch.sqrt((states * states).sum(-1, keepdim=True) / states.shape[-1] + eps)


def turn(vector: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """A head's vector as complex numbers `(i, i + head_dim/2)`, each turned by its angle at this position."""
    half = vector.shape[-1] // 2
    numbers = torch.complex(vector[:half], vector[half:])
    angles = torch.tensor([position / theta ** (i / half) for i in range(half)], dtype=vector.dtype)
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag))


def logits(weights, config, tokens, documents=None) -> torch.Tensor:
    """Logits (seq, vocab) of one row.

    Args:
        weights: `model.named_parameters()` as a dictionary.
        documents: the document that each token belongs to; positions start anew in each. None for one document.
    """
    length = len(tokens)
    documents = documents if documents is not None else [0] * length
    positions = [sum(other == documents[i] for other in documents[:i]) for i in range(length)]
    eps, head_dim = config.rms_norm_eps, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    shared_by = config.num_attention_heads // config.num_key_value_heads
    table = weights["model.embed_tokens.weight"]
    embed_eps = eps / config.hidden_size**2 if config.tie_word_embeddings else eps
    stream = norm(torch.stack([table[token] for token in tokens]), embed_eps)  # (seq, hidden)

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        normed = norm(stream, eps)
        heads = []
        for head in range(config.num_attention_heads):
            query_rows = slice(head * head_dim, (head + 1) * head_dim)
            key_rows = slice(head // shared_by * head_dim, (head // shared_by + 1) * head_dim)
            query = norm(normed @ weights[f"{name}.self_attn.q_proj.weight"][query_rows].T, eps)
            key = norm(normed @ weights[f"{name}.self_attn.k_proj.weight"][key_rows].T, eps)
            value = normed @ weights[f"{name}.self_attn.v_proj.weight"][key_rows].T
            query = torch.stack([turn(query[i], positions[i], theta) for i in range(length)])
            key = torch.stack([turn(key[i], positions[i], theta) for i in range(length)])
            attended = []
            for i in range(length):
                seen = [j for j in range(i + 1) if documents[j] == documents[i]]
                scores = torch.stack([1.2 * query[i] @ (1.2 * key[j]) / math.sqrt(head_dim) for j in seen])
                shares = torch.exp(scores) / torch.exp(scores).sum()
                attended.append(sum(share * value[j] for share, j in zip(shares, seen, strict=True)))
            heads.append(torch.stack(attended))  # (seq, head_dim)
        stream = stream + torch.cat(heads, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
        inner = torch.clamp(norm(stream, eps) @ weights[f"{name}.mlp.up_proj.weight"].T, min=0) ** 2
        stream = stream + inner @ weights[f"{name}.mlp.down_proj.weight"].T

    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return norm(stream, eps) @ weights[head_name].T


def loss(weights, config, tokens, documents=None) -> torch.Tensor:
    """Mean of the negative log likelihood of each token but the first, whatever document it is of."""
    rows = logits(weights, config, tokens, documents)
    log_shares = rows - torch.log(torch.exp(rows).sum(-1, keepdim=True))
    return -sum(log_shares[i, tokens[i + 1]] for i in range(len(tokens) - 1)) / (len(tokens) - 1)
