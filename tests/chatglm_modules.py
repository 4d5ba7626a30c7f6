"""The modules of ChatGLM's original code, for PEFT to put adapters on."""

from torch import nn

from chatglm_folders import config, tensors


class OriginalModules(nn.Module):
    """Modules with the weights and the names of ChatGLM's code, for PEFT to find."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "chatglm"}
        for name, tensor in tensors(config()).items():
            path, _, kind = name.rpartition(".")
            if kind != "weight":
                continue
            place: nn.Module = self
            *parents, last = path.split(".")
            for part in parents:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            if tensor.dim() == 1:
                place.add_module(last, nn.RMSNorm(len(tensor)))
            elif last == "word_embeddings":
                place.add_module(last, nn.Embedding(*tensor.shape))
            else:
                bias = "query_key_value" in last
                place.add_module(last, nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias))
        own = {k: t for k, t in tensors(config()).items() if not k.endswith("inv_freq")}
        self.load_state_dict(own)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks every causal model for one."""
