"""PyTorch Lightning: a converted model is a module, and BatchLoader goes where a DataLoader would.

    pip install lightning && python examples/train_lightning.py [generated:n=20000]

Needs Lightning, which vqgnn does not install; not run by the tests.
"""

import sys

import torch
import torch.nn.functional as F
from torch_geometric.nn.models import GCN

import vqgnn
from vqgnn.datasets import load

try:
    import lightning
except ImportError:
    sys.exit("examples/train_lightning.py needs PyTorch Lightning: pip install lightning")


class Classifier(lightning.LightningModule):
    def __init__(self, data, num_classes: int):
        super().__init__()
        self.model = GCN(data.num_features, 128, 3, num_classes, norm="batch_norm", dropout=0.3)
        vqgnn.convert(self.model, data)
        self.averaged = vqgnn.MovingAverage(self.model)

    def training_step(self, batch, batch_idx):
        out = self.model(batch.x, batch.graph)
        return F.cross_entropy(out[batch.train_mask], batch.y[batch.train_mask])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.averaged.update_parameters(self.model)

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), lr=0.003)


def main(dataset: str = "generated:n=20000", epochs: int = 15) -> None:
    loaded = load(dataset)
    data = loaded.data
    module = Classifier(data, loaded.num_classes)
    # the data is on the CPU, so the model too; Lightning leaves vqgnn's batches as they are
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, vqgnn.BatchLoader(data))
    predicted = vqgnn.inference.layerwise(module.averaged.module, data).argmax(1)
    print(f"test accuracy {(predicted == data.y)[data.test_mask].float().mean():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
