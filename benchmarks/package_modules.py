"""Train modules of other packages on random data.

Where a package has LightningModules, they are trained as they are. Where it has networks only, the LightningModule
around them is that of its documentation: the loss and the optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.training import BATCH, SAMPLES, STEPS, TASKS, Cases, Module, fit, images, two

CASES = Cases()

# Words, and length of sentences.
WORDS, LENGTH = 64, 16


# Lightning's demos


@CASES.add("lightning", "BoringModel")
def boring_model(callbacks: list[Callback]) -> nn.Module:
    """Train a linear layer with the mean squared error."""
    from lightning.pytorch.demos import BoringModel

    loaders = [DataLoader(torch.randn(SAMPLES, 32), BATCH, shuffle=True) for _ in TASKS]
    return fit(BoringModel(), loaders, callbacks)


def _write_text(words: int) -> None:
    """Write random words where the demos of language models look for theirs."""
    path = Path("data/wikitext-2.txt")
    path.parent.mkdir(exist_ok=True)
    lines = torch.randint(words, (800, 20)).tolist()
    path.write_text("\n".join(" ".join(f"word{index}" for index in line) for line in lines))


@CASES.add("lightning", "LightningTransformer, 1001 words")
def lightning_transformer(callbacks: list[Callback]) -> nn.Module:
    """Train a Transformer with ``nll_loss`` on flattened ``log_softmax``; its own loader has batches of one."""
    from lightning.pytorch.demos import LightningTransformer

    module = LightningTransformer(vocab_size=1001)
    for _ in TASKS:
        _write_text(1000)
        fit(module, [None], callbacks)
    return module


@CASES.add("lightning", "LightningLSTM, 101 words")
def lightning_lstm(callbacks: list[Callback]) -> nn.Module:
    """Train an LSTM that keeps its state from batch to batch."""
    from lightning.pytorch.demos import LightningLSTM

    module = LightningLSTM(vocab_size=101)
    for _ in TASKS:
        _write_text(100)
        fit(module, [None], callbacks)
    return module


# pytorch-forecasting


def _series_data() -> Any:
    """Return random walks of 16 series as a data frame."""
    import pandas as pd

    series, times = 16, 60
    walks = 10 + torch.randn(series, times).cumsum(1)
    columns = {
        "series": [str(index) for index in range(series) for _ in range(times)],
        "time": [*range(times)] * series,
        "value": walks.flatten().tolist(),
    }
    return pd.DataFrame(columns)


def _forecast(callbacks: list[Callback], model: Any, *, covariates: bool = True, **options: Any) -> nn.Module:
    from pytorch_forecasting import TimeSeriesDataSet

    known = {"time_varying_known_reals": ["time"], "static_categoricals": ["series"]} if covariates else {}
    data = [
        TimeSeriesDataSet(
            _series_data(),
            time_idx="time",
            target="value",
            group_ids=["series"],
            min_encoder_length=20,
            max_encoder_length=20,
            min_prediction_length=5,
            max_prediction_length=5,
            time_varying_unknown_reals=["value"],
            **known,
        )
        for _ in TASKS
    ]
    module = model.from_dataset(data[0], learning_rate=1e-2, optimizer="adam", **options)
    return fit(module, [each.to_dataloader(train=True, batch_size=BATCH) for each in data], callbacks)


@CASES.add("pytorch-forecasting", "TemporalFusionTransformer, quantiles")
def temporal_fusion_transformer(callbacks: list[Callback]) -> nn.Module:
    """Train with the quantile loss of its tutorial."""
    from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer

    options = {"hidden_size": 8, "attention_head_size": 1, "hidden_continuous_size": 8, "loss": QuantileLoss()}
    return _forecast(callbacks, TemporalFusionTransformer, **options)


@CASES.add("pytorch-forecasting", "DeepAR, normal likelihood")
def deep_ar(callbacks: list[Callback]) -> nn.Module:
    """Train with its default loss."""
    from pytorch_forecasting import DeepAR

    return _forecast(callbacks, DeepAR, hidden_size=16)


@CASES.add("pytorch-forecasting", "NBeats, MASE")
def nbeats(callbacks: list[Callback]) -> nn.Module:
    """Train with its default loss."""
    from pytorch_forecasting import NBeats

    return _forecast(callbacks, NBeats, covariates=False, widths=[32, 32])


@CASES.add("pytorch-forecasting", "NHiTS, SMAPE")
def pytorch_forecasting_nhits(callbacks: list[Callback]) -> nn.Module:
    """Train with the symmetric percentage error."""
    from pytorch_forecasting import SMAPE, NHiTS

    return _forecast(callbacks, NHiTS, hidden_size=32, loss=SMAPE())


@CASES.add("pytorch-forecasting", "RecurrentNetwork, MAE")
def recurrent_network(callbacks: list[Callback]) -> nn.Module:
    """Train with the absolute error."""
    from pytorch_forecasting import MAE, RecurrentNetwork

    return _forecast(callbacks, RecurrentNetwork, hidden_size=16, loss=MAE())


@CASES.add("pytorch-forecasting", "DecoderMLP, RMSE")
def decoder_mlp(callbacks: list[Callback]) -> nn.Module:
    """Train with the root of the mean squared error."""
    from pytorch_forecasting import RMSE, DecoderMLP

    return _forecast(callbacks, DecoderMLP, hidden_size=32, loss=RMSE())


# neuralforecast


def _neuralforecast(callbacks: list[Callback], model: Any, loss: nn.Module, **options: Any) -> nn.Module:
    from neuralforecast.tsdataset import TimeSeriesDataset

    module = model(
        h=5,
        input_size=20,
        loss=loss,
        max_steps=STEPS,
        windows_batch_size=64,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    for _ in TASKS:
        frame = _series_data().rename(columns={"series": "unique_id", "time": "ds", "value": "y"})
        dataset, *_ = TimeSeriesDataset.from_df(frame)
        module.fit(dataset)
    return module


@CASES.add("neuralforecast", "NHITS, MAE")
def neuralforecast_nhits(callbacks: list[Callback]) -> nn.Module:
    """Train with its default loss."""
    from neuralforecast.losses.pytorch import MAE
    from neuralforecast.models import NHITS

    return _neuralforecast(callbacks, NHITS, MAE(), mlp_units=[[32, 32]] * 3)


@CASES.add("neuralforecast", "MLP, MQLoss")
def neuralforecast_mlp(callbacks: list[Callback]) -> nn.Module:
    """Train with several quantiles."""
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import MLP

    return _neuralforecast(callbacks, MLP, MQLoss(level=[80, 90]), hidden_size=32)


@CASES.add("neuralforecast", "NBEATS, SMAPE")
def neuralforecast_nbeats(callbacks: list[Callback]) -> nn.Module:
    """Train with the symmetric percentage error."""
    from neuralforecast.losses.pytorch import SMAPE
    from neuralforecast.models import NBEATS

    return _neuralforecast(callbacks, NBEATS, SMAPE(), mlp_units=[[32, 32]] * 3)


@CASES.add("neuralforecast", "DeepAR, Student's t")
def neuralforecast_deep_ar(callbacks: list[Callback]) -> nn.Module:
    """Train with a likelihood."""
    from neuralforecast.losses.pytorch import DistributionLoss
    from neuralforecast.models import DeepAR

    options = {"lstm_hidden_size": 16, "lstm_n_layers": 1}
    return _neuralforecast(callbacks, DeepAR, DistributionLoss("StudentT", level=[80, 90]), **options)


@CASES.add("neuralforecast", "PatchTST, HuberLoss")
def patch_tst(callbacks: list[Callback]) -> nn.Module:
    """Train a Transformer of patches."""
    from neuralforecast.losses.pytorch import HuberLoss
    from neuralforecast.models import PatchTST

    options = {"encoder_layers": 1, "hidden_size": 16, "linear_hidden_size": 32, "n_heads": 2, "patch_len": 5}
    return _neuralforecast(callbacks, PatchTST, HuberLoss(), stride=5, **options)


# chemprop

# Any sequence of these is the SMILES string of a molecule.
_FRAGMENTS = ["C", "CC", "CO", "CN", "CS", "C(=O)", "C(F)", "C(Cl)", "C=C", "c1ccccc1C"]


def _chemprop(callbacks: list[Callback], predictor: nn.Module, targets: Callable[[], float]) -> nn.Module:
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation

    def loader() -> Any:
        molecules = ["".join(_FRAGMENTS[index] for index in torch.randint(10, (3,)).tolist()) for _ in range(SAMPLES)]
        points = [MoleculeDatapoint.from_smi(molecule, [targets()]) for molecule in molecules]
        return build_dataloader(MoleculeDataset(points), batch_size=BATCH)

    module = MPNN(BondMessagePassing(d_h=32), MeanAggregation(), predictor)
    return fit(module, [loader() for _ in TASKS], callbacks)


@CASES.add("chemprop", "MPNN, regression")
def chemprop_regression(callbacks: list[Callback]) -> nn.Module:
    """Train a message-passing network with the mean squared error."""
    from chemprop.nn import RegressionFFN

    return _chemprop(callbacks, RegressionFFN(input_dim=32, hidden_dim=32), lambda: torch.randn(()).item())


@CASES.add("chemprop", "MPNN, binary classification")
def chemprop_classification(callbacks: list[Callback]) -> nn.Module:
    """Train a message-passing network with the binary cross-entropy."""
    from chemprop.nn import BinaryClassificationFFN

    predictor = BinaryClassificationFFN(input_dim=32, hidden_dim=32)
    return _chemprop(callbacks, predictor, lambda: float(torch.randint(2, ())))


# scvi-tools


@CASES.add("scvi-tools", "SCVI")
def scvi_vae(callbacks: list[Callback]) -> nn.Module:
    """Train a variational autoencoder of gene counts by its own training plan."""
    import numpy as np
    from anndata import AnnData
    from scvi import settings
    from scvi.model import SCVI

    # Without it, the training set is shuffled by fresh entropy.
    settings.seed = 0
    cells = AnnData(np.zeros((SAMPLES, 50), dtype=np.float32))
    cells.X = torch.poisson(torch.rand(SAMPLES, 50) * 5).numpy()
    SCVI.setup_anndata(cells)
    model = SCVI(cells, n_hidden=32, n_latent=5)
    for _ in TASKS:
        cells.X = torch.poisson(torch.rand(SAMPLES, 50) * 5).numpy()
        model.train(
            max_epochs=STEPS * BATCH // SAMPLES,
            batch_size=BATCH,
            train_size=1.0,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_progress_bar=False,
        )
    return model.module


# lightly


def _views() -> list[DataLoader[Any]]:
    """Return two noisy views of each random image, for each task."""

    def draw() -> tuple[Tensor, Tensor]:
        image = torch.randn(SAMPLES, 3, 16, 16)
        return image + 0.1 * torch.randn_like(image), image + 0.1 * torch.randn_like(image)

    return two(draw)


def _lightly_backbone() -> nn.Module:
    from lightly.models import ResNetGenerator

    backbone = ResNetGenerator("resnet-9", width=0.125)
    return nn.Sequential(*list(backbone.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


@CASES.add("lightly", "SimCLR")
def sim_clr(callbacks: list[Callback]) -> nn.Module:
    """Train with a contrastive loss, which couples the samples of a batch."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    class SimCLR(Module):
        criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.criterion(self.net(batch[0]), self.net(batch[1]))

    backbone = _lightly_backbone()
    width = backbone(torch.zeros(2, 3, 16, 16)).shape[1]
    return fit(SimCLR(nn.Sequential(backbone, SimCLRProjectionHead(width, 64, 32))), _views(), callbacks)


@CASES.add("lightly", "BYOL")
def byol(callbacks: list[Callback]) -> nn.Module:
    """Train with the cosine similarity to a network that follows the trained one."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class BYOL(Module):
        criterion = NegativeCosineSimilarity()

        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.predictor = BYOLPredictionHead(32, 64, 32)
            self.target = copy.deepcopy(net)
            deactivate_requires_grad(self.target)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.net, self.target, m=0.99)
            one, other = (self.predictor(self.net(view)) for view in batch)
            with torch.no_grad():
                target_one, target_other = (self.target(view) for view in batch)
            return 0.5 * (self.criterion(one, target_other) + self.criterion(other, target_one))

    backbone = _lightly_backbone()
    width = backbone(torch.zeros(2, 3, 16, 16)).shape[1]
    return fit(BYOL(nn.Sequential(backbone, BYOLProjectionHead(width, 64, 32))), _views(), callbacks)


# timm


class Classifier(Module):
    """A classifier of images."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])


@CASES.add("timm", "ViT")
def timm_vit(callbacks: list[Callback]) -> nn.Module:
    """Train a Vision Transformer of 2 layers."""
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    return fit(Classifier(net), two(images), callbacks)


@CASES.add("timm", "ResNet")
def timm_resnet(callbacks: list[Callback]) -> nn.Module:
    """Train a network with batch norm."""
    import timm

    return fit(Classifier(timm.create_model("test_resnet", num_classes=10)), two(images), callbacks)


@CASES.add("timm", "ConvNeXt")
def timm_convnext(callbacks: list[Callback]) -> nn.Module:
    """Train a network with layer scale."""
    import timm

    net = timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(16, 32, 64, 128))
    return fit(Classifier(net), two(images), callbacks)


# transformers


class Pretrained(Module):
    """A model of transformers, which computes its loss itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of the model."""
        loss: Tensor = self.net(**batch).loss
        return loss


def _records(draw: Callable[[], dict[str, Tensor]], batch_size: int = BATCH) -> list[DataLoader[Any]]:
    """Return a loader of batches by name for each task; ``draw`` returns the data of one."""
    loaders: list[DataLoader[Any]] = []
    for _ in TASKS:
        columns = draw()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        loaders.append(DataLoader(rows, batch_size, shuffle=True))  # type: ignore[arg-type]
    return loaders


def _sentences(words: int = WORDS, length: int = LENGTH, sentences: int = SAMPLES) -> dict[str, Tensor]:
    tokens = torch.randint(words, (sentences, length))
    return {"input_ids": tokens, "labels": tokens.clone()}


def _masked_sentences() -> dict[str, Tensor]:
    """Mask 15 % of the words; the others are not predicted."""
    tokens = torch.randint(1, WORDS, (SAMPLES, LENGTH))
    masked = torch.rand(tokens.shape) < 0.15
    return {"input_ids": tokens.masked_fill(masked, 0), "labels": tokens.masked_fill(~masked, -100)}


def _labelled_sentences(classes: int = 3) -> dict[str, Tensor]:
    """Return sentences of different lengths with a label each."""
    lengths = torch.randint(4, LENGTH + 1, (SAMPLES, 1))
    return {
        "input_ids": torch.randint(1, WORDS, (SAMPLES, LENGTH)),
        "attention_mask": (torch.arange(LENGTH) < lengths).long(),
        "labels": torch.randint(classes, (SAMPLES,)),
    }


def _bert_config(**options: Any) -> Any:
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **sizes, **options)


@CASES.add("transformers", "BERT, masked words")
def bert_masked(callbacks: list[Callback]) -> nn.Module:
    """Train a masked language model."""
    from transformers import BertForMaskedLM

    return fit(Pretrained(BertForMaskedLM(_bert_config())), _records(_masked_sentences), callbacks)


@CASES.add("transformers", "BERT, sentences")
def bert_classifier(callbacks: list[Callback]) -> nn.Module:
    """Train a classifier of sentences."""
    from transformers import BertForSequenceClassification

    net = BertForSequenceClassification(_bert_config(num_labels=3))
    return fit(Pretrained(net), _records(_labelled_sentences), callbacks)


def _gpt2(words: int, length: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=words, n_positions=length, n_embd=32, n_layer=2, n_head=2))


@CASES.add("transformers", "GPT-2")
def gpt2(callbacks: list[Callback]) -> nn.Module:
    """Train a language model of 28 000 parameters."""
    return fit(Pretrained(_gpt2(WORDS, LENGTH)), _records(_sentences), callbacks)


@CASES.add("transformers", "GPT-2, 5000 words × 64 tokens × 8")
def gpt2_vocabulary(callbacks: list[Callback]) -> nn.Module:
    """Train a language model with a real vocabulary."""
    return fit(Pretrained(_gpt2(5000, 64)), _records(lambda: _sentences(5000, 64), batch_size=8), callbacks)


@CASES.add("transformers", "Llama")
def llama(callbacks: list[Callback]) -> nn.Module:
    """Train a language model with rotary embeddings and grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=LENGTH, **sizes)
    return fit(Pretrained(LlamaForCausalLM(config)), _records(_sentences), callbacks)


@CASES.add("transformers", "T5")
def t5(callbacks: list[Callback]) -> nn.Module:
    """Train an encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes)
    return fit(Pretrained(T5ForConditionalGeneration(config)), _records(_sentences), callbacks)


@CASES.add("transformers", "ViT")
def vit(callbacks: list[Callback]) -> nn.Module:
    """Train a Vision Transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes)
    loaders = _records(lambda: dict(zip(("pixel_values", "labels"), images(), strict=True)))
    return fit(Pretrained(ViTForImageClassification(config)), loaders, callbacks)


# peft


@CASES.add("peft", "LoRA of BERT", "transformers")
def lora(callbacks: list[Callback]) -> nn.Module:
    """Train low-rank updates of a frozen classifier of sentences."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import BertForSequenceClassification

    net = BertForSequenceClassification(_bert_config(num_labels=3))
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules=["query", "value"])
    return fit(Pretrained(get_peft_model(net, config)), _records(_labelled_sentences), callbacks)


# torch-geometric


def _graph(nodes: int, **labels: Tensor) -> Any:
    from torch_geometric.data import Data

    return Data(x=torch.randn(nodes, 16), edge_index=torch.randint(nodes, (2, 4 * nodes)), **labels)


@CASES.add("torch-geometric", "GCN, nodes")
def gcn_nodes(callbacks: list[Callback]) -> nn.Module:
    """Train on a half of the nodes of one graph, which couples all of them."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn.models import GCN

    class NodeClassifier(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch.x, batch.edge_index)
            return F.cross_entropy(logits[batch.train_mask], batch.y[batch.train_mask])

    def loader() -> Any:
        return GraphLoader([_graph(100, y=torch.randint(4, (100,)), train_mask=torch.arange(100) < 50)])

    return fit(NodeClassifier(GCN(16, 32, 2, 4)), [loader() for _ in TASKS], callbacks)


@CASES.add("torch-geometric", "GIN, graphs")
def gin_graphs(callbacks: list[Callback]) -> nn.Module:
    """Train a classifier of graphs, whose nodes stand in one tensor for all graphs of a batch."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import global_add_pool
    from torch_geometric.nn.models import GIN

    class GraphClassifier(Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.head = nn.Linear(32, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features = global_add_pool(self.net(batch.x, batch.edge_index), batch.batch)
            return F.cross_entropy(self.head(features), batch.y)

    def loader() -> Any:
        sizes = torch.randint(5, 15, (SAMPLES,)).tolist()
        graphs = [_graph(size, y=torch.randint(4, (1,))) for size in sizes]
        return GraphLoader(graphs, batch_size=BATCH, shuffle=True)

    return fit(GraphClassifier(GIN(16, 32, 2)), [loader() for _ in TASKS], callbacks)


# segmentation-models-pytorch


def _masks() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 3, 32, 32), (torch.rand(64, 1, 32, 32) < 0.3).float()


def _unet(callbacks: list[Callback], criterion: nn.Module) -> nn.Module:
    import segmentation_models_pytorch as smp

    class Segmenter(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return criterion(self.net(batch[0]), batch[1])

    options = {"decoder_channels": (64, 32, 16), "encoder_depth": 3}
    net = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1, **options)
    return fit(Segmenter(net), two(_masks, batch_size=8), callbacks)


@CASES.add("segmentation-models-pytorch", "Unet, Dice loss", "timm")
def unet_dice(callbacks: list[Callback]) -> nn.Module:
    """Train with the Dice loss, which couples the samples of a batch."""
    from segmentation_models_pytorch.losses import DiceLoss

    return _unet(callbacks, DiceLoss("binary"))


@CASES.add("segmentation-models-pytorch", "Unet, focal loss", "timm")
def unet_focal(callbacks: list[Callback]) -> nn.Module:
    """Train with the focal loss of each pixel."""
    from segmentation_models_pytorch.losses import FocalLoss

    return _unet(callbacks, FocalLoss("binary"))
