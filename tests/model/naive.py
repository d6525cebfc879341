"""The scratch model written a second time, for reading: one row at a time, loops over heads and positions."""

from __future__ import annotations

import math

import torch


def norm(states: torch.Tensor, eps: float) -> torch.Tensor:
    """Divides each vector by its root mean square."""
    return states / torch.sqrt((states * states).sum(-1, keepdim=True) / states.shape[-1] + eps)


def frequencies(config, length: int) -> tuple[list[float], float]:
    """Angle a position of each pair, and what turned vectors are multiplied with.

    Args:
        length: of the row, which dynamic positions go by.
    """
    rope = config.rope_parameters
    theta, factor = rope["rope_theta"], rope.get("factor", 1.0)
    dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
    trained = config.max_position_embeddings
    if rope["rope_type"] == "dynamic" and length > trained:
        theta *= (factor * length / trained - factor + 1) ** (dim / (dim - 2))
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    original = rope.get("original_max_position_embeddings", trained)
    if rope["rope_type"] == "linear":
        return [each / factor for each in plain], 1.0
    if rope["rope_type"] == "llama3":
        found = []
        for each in plain:
            wavelength = 2 * math.pi / each
            if wavelength > original / rope["low_freq_factor"]:
                found.append(each / factor)
            elif wavelength < original / rope["high_freq_factor"]:
                found.append(each)
            else:
                low, high = rope["low_freq_factor"], rope["high_freq_factor"]
                smooth = (original / wavelength - low) / (high - low)
                found.append((1 - smooth) * each / factor + smooth * each)
        return found, 1.0
    if rope["rope_type"] == "yarn":
        ends = [dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
        found = []
        for pair, each in enumerate(plain):
            stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
            found.append(each / factor * stretched + each * (1 - stretched))
        return found, 0.1 * math.log(factor) + 1.0
    return plain, 1.0


def turn(vector: torch.Tensor, position: int, angles_a_position: list[float], scale: float) -> torch.Tensor:
    """A head's vector, its first values taken as complex numbers `(i, i + half)`, each turned by its angle here."""
    half = len(angles_a_position)
    numbers = torch.complex(vector[:half], vector[half : 2 * half])
    angles = torch.tensor([position * each for each in angles_a_position], dtype=vector.dtype)
    turned = numbers * torch.polar(torch.full_like(angles, scale), angles)
    return torch.cat((turned.real, turned.imag, vector[2 * half :]))


def hidden_states(weights, config, tokens, documents=None) -> torch.Tensor:
    """The last hidden states (seq, hidden) of one row.

    Args:
        weights: `model.named_parameters()` as a dictionary.
        documents: the document that each token belongs to; positions start anew in each. None for one document.
    """
    length = len(tokens)
    documents = documents if documents is not None else [0] * length
    positions = [sum(other == documents[i] for other in documents[:i]) for i in range(length)]
    eps, head_dim = config.rms_norm_eps, config.head_dim
    angles, scale = frequencies(config, max(positions) + 1)
    shared_by = config.num_attention_heads // config.num_key_value_heads
    table = weights["model.embed_tokens.weight"]
    embed_eps = eps / config.hidden_size**2 if config.tie_word_embeddings else eps
    stream = norm(torch.stack([table[token] for token in tokens]), embed_eps)  # (seq, hidden)
    first_values = None

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        normed = norm(stream, eps)
        is_sliding = config.layer_types[layer] == "sliding_attention"

        def sees(i: int, j: int, is_sliding=is_sliding) -> bool:
            if documents[i] != documents[j]:
                return False
            if config.is_causal:
                return j <= i and (not is_sliding or i - j < config.sliding_window)
            return not is_sliding or abs(i - j) <= config.sliding_window

        values = normed @ weights[f"{name}.self_attn.v_proj.weight"].T  # (seq, kv heads · head_dim)
        own_values = values
        if config.value_mixing == "residual" and layer > 0:
            share = weights[f"{name}.self_attn.value_mix.share"]
            values = (1 - share) * values + share * first_values
        table_name = f"model.value_embeds.{layer}.weight"
        if table_name in weights:
            looked_up = torch.stack([weights[table_name][token] for token in tokens])
            gate = weights[f"{name}.self_attn.value_mix.gate.weight"]  # (kv heads, channels)
            gates = 3 / (1 + torch.exp(-normed[:, : gate.shape[1]] @ gate.T))
            values = values + gates.repeat_interleave(head_dim, dim=1) * looked_up
        if layer == 0:
            first_values = own_values

        heads = []
        for head in range(config.num_attention_heads):
            query_rows = slice(head * head_dim, (head + 1) * head_dim)
            key_rows = slice(head // shared_by * head_dim, (head // shared_by + 1) * head_dim)
            query = normed @ weights[f"{name}.self_attn.q_proj.weight"][query_rows].T
            key = normed @ weights[f"{name}.self_attn.k_proj.weight"][key_rows].T
            query, key = 1.2 * norm(query, eps), 1.2 * norm(key, eps)
            query = torch.stack([turn(query[i], positions[i], angles, scale) for i in range(length)])
            key = torch.stack([turn(key[i], positions[i], angles, scale) for i in range(length)])
            attended = []
            for i in range(length):
                seen = [j for j in range(length) if sees(i, j)]
                scores = torch.stack([query[i] @ key[j] / math.sqrt(head_dim) for j in seen])
                shares = torch.exp(scores) / torch.exp(scores).sum()
                attended.append(sum(share * values[j, key_rows] for share, j in zip(shares, seen, strict=True)))
            heads.append(torch.stack(attended))  # (seq, head_dim)
        stream = stream + torch.cat(heads, dim=-1) @ weights[f"{name}.self_attn.o_proj.weight"].T
        inner = norm(stream, eps) @ weights[f"{name}.mlp.up_proj.weight"].T
        if config.hidden_act == "silu":
            gate = norm(stream, eps) @ weights[f"{name}.mlp.gate_proj.weight"].T
            inner = inner * gate / (1 + torch.exp(-gate))
        else:
            inner = torch.clamp(inner, min=0) ** 2
        stream = stream + inner @ weights[f"{name}.mlp.down_proj.weight"].T
    return norm(stream, eps)


def logits(weights, config, tokens, documents=None) -> torch.Tensor:
    """Logits (seq, vocab) of one row; arguments as for `hidden_states`."""
    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    rows = hidden_states(weights, config, tokens, documents) @ weights[head_name].T
    cap = config.final_logit_softcapping
    return rows if cap is None else cap * (1 - 2 / (torch.exp(2 * rows / cap) + 1))


def cross_entropy(rows: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Mean negative log likelihood of the labels, those of -100 left out."""
    log_shares = rows - torch.log(torch.exp(rows).sum(-1, keepdim=True))
    counted = [-log_shares[i, label] for i, label in enumerate(labels) if label != -100]
    return sum(counted) / len(counted)


def loss(weights, config, tokens, documents=None) -> torch.Tensor:
    """Mean of the negative log likelihood of each token but the first, whatever document it is of."""
    return cross_entropy(logits(weights, config, tokens, documents)[:-1], tokens[1:].tolist())
