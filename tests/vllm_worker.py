"""What a vLLM server's workers do besides: take weights from a file, as no CPU has the transport that TRL sends them by."""

from safetensors.torch import load_file


class WeightsFromFile:
    def load_file(self, path):
        self.model_runner.model.load_weights(load_file(path).items())
