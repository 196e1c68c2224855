"""Layers to export, with the batches that they are exported and run with."""

import torch
from torch.export import Dim

import gpu_embed
from gpu_embed import batch_bags, batch_padded

V, D = 9, 4
TABLES = {"item": (V, 6), "user": (5, 3), "shop": (7, 8)}
UNIFORM = {name: (rows, D) for name, (rows, _) in TABLES.items()}
MODES = ("sum", "mean", "max")
# Operators that torch.export records beside aten's: of sizes, and of tuples.
OF_SIZES = ("sym_", "add", "sub", "mul", "floordiv", "mod", "eq", "getitem")


def integers(*shape, low=-4, high=5, seed=0, dtype=torch.float32):
    """Small integers, whose sums are exact in any order."""
    values = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=values).to(dtype)


def with_integers(module):
    """The module with small integers in its tables, and zeros in padding rows."""
    with torch.no_grad():
        for number, param in enumerate(module.parameters()):
            param.copy_(integers(*param.shape, seed=number))
    return module


def lengths(num_bags, seed):
    """Ids a bag: none, and several."""
    return integers(num_bags, low=0, high=4, seed=seed, dtype=torch.int64)


def ids_of(sizes, rows=V, behind=0, seed=0):
    """Ids and where each bag begins and the last ends; the offsets [B + 1]."""
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return integers(int(offsets[-1]) + behind, low=0, high=rows, seed=seed).long(), offsets


class Lookup(torch.nn.Module):
    def __init__(self, dim=D, dtype=torch.float32, ids=torch.int64, **arguments):
        super().__init__()
        self.table = gpu_embed.Embedding(V, dim, dtype=dtype, **arguments)
        self.ids = ids

    def batch(self, size):
        return (integers(size, 3, low=0, high=V, seed=size, dtype=self.ids),)

    dynamic = ({0: Dim.DYNAMIC},)

    def forward(self, ids):
        return self.table(ids)


class Rows(Lookup):
    """Bags that are the rows of a matrix of ids."""

    def __init__(self, weighted=False, dtype=torch.float32, ids=torch.int64, **arguments):
        torch.nn.Module.__init__(self)
        self.table = gpu_embed.EmbeddingBag(V, D, dtype=dtype, **arguments)
        self.weighted, self.ids = weighted, ids
        self.dynamic = ({0: Dim.DYNAMIC},) * (1 + weighted)

    def batch(self, size):
        (ids,) = super().batch(size)
        return (ids, integers(size, 3, seed=7)) if self.weighted else (ids,)

    def forward(self, ids, weights=None):
        return self.table(ids, per_sample_weights=weights)


class Bags(torch.nn.Module):
    """Bags at offsets; with `include_last_offset` there are ids behind the last."""

    def __init__(self, weighted=False, offsets=torch.int64, **arguments):
        super().__init__()
        self.table = gpu_embed.EmbeddingBag(V, D, **arguments)
        self.weighted, self.offsets = weighted, offsets
        self.dynamic = ({0: Dim.DYNAMIC},) * (2 + weighted)

    def batch(self, size):
        last = self.table.include_last_offset
        ids, offsets = ids_of(lengths(size, seed=size), behind=2 if last else 0)
        offsets = (offsets if last else offsets[:-1]).to(self.offsets)
        weights = (integers(len(ids), seed=7),) if self.weighted else ()
        return ids, offsets, *weights

    def forward(self, ids, offsets, weights=None):
        return self.table(ids, offsets, weights)


class Tables(torch.nn.Module):
    """Batched tables, given ids and offsets; one id is behind the last offset."""

    def __init__(self, pooled=True, sizes=TABLES, weighted=False, **arguments):
        super().__init__()
        layer = gpu_embed.TableBatchedEmbeddingBag if pooled else gpu_embed.TableBatchedEmbedding
        self.tables = layer(sizes, **arguments)
        self.weighted = weighted
        self.dynamic = ({0: Dim.DYNAMIC},) * (2 + weighted)

    def batch(self, size):
        layout = self.tables.layout
        rows = [layout.num_embeddings[table] for table in layout.feature_tables]
        features = [
            ids_of(lengths(size, seed=size + number), one, seed=number)
            for number, one in enumerate(rows)
        ]
        ids, offsets, *_ = batch_bags([(ids, offsets[:-1]) for ids, offsets in features])
        ids = torch.cat([ids, ids.new_zeros(1)])
        weights = (integers(len(ids), seed=7),) if self.weighted else ()
        return ids, offsets, *weights

    def forward(self, *batch):
        return self.tables(*batch)


class Padded(Tables):
    """Batched tables that put padded ids together within the model, in another order than the layer's."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dynamic = ({0: Dim.DYNAMIC},) * len(self.tables)

    def batch(self, size):
        return tuple(
            integers(size, 3, low=0, high=rows, seed=number).long()
            for number, rows in enumerate(self.tables.layout.num_embeddings)
        )

    def forward(self, item, user, shop):
        return self.tables(
            *batch_padded({"shop": shop, "item": item, "user": user}, padding_value=0)
        )


class Quantized(torch.nn.Module):
    """One of these models with its table quantized."""

    def __init__(self, model, **arguments):
        super().__init__()
        for name, layer in model.named_children():
            pooled = isinstance(layer, (torch.nn.EmbeddingBag, gpu_embed.TableBatchedEmbeddingBag))
            kind = gpu_embed.QuantizedEmbeddingBag if pooled else gpu_embed.QuantizedEmbedding
            setattr(model, name, kind.from_float(with_integers(layer), **arguments))
        self.model, self.dynamic = model, model.dynamic

    def batch(self, size):
        return self.model.batch(size)

    def forward(self, *batch):
        return self.model(*batch)


class Swapped(torch.nn.Module):
    """A model of torch's layers whose tables were replaced."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(V, D, padding_idx=0)
        self.text = torch.nn.EmbeddingBag(V, D, mode="max")
        self.head = torch.nn.Linear(2 * D, 2)
        assert len(gpu_embed.replace_embeddings(self).replaced) == 2

    dynamic = ({0: Dim.DYNAMIC},)

    def batch(self, size):
        return (integers(size, 3, low=0, high=V, seed=size).long(),)

    def forward(self, ids):
        return self.head(torch.cat([self.words(ids).sum(1), self.text(ids)], 1))


FEATURES = {"item": "item", "bought": "item", "user": "user", "shop": "shop"}
PER_TABLE = {"mode": dict(zip(TABLES, MODES, strict=True)), "padding_idx": {"item": 2, "shop": -1}}
CASES = {
    "lookup": lambda: Lookup(),
    "lookup, padding": lambda: Lookup(padding_idx=-1),
    "lookup, int32": lambda: Lookup(ids=torch.int32),
    "lookup, int16": lambda: Lookup(ids=torch.int16),
    "lookup, uint8": lambda: Lookup(ids=torch.uint8),
    "lookup, fp64": lambda: Lookup(dtype=torch.float64),
    "lookup, fp16": lambda: Lookup(dtype=torch.float16),
    **{f"rows, {mode}": lambda mode=mode: Rows(mode=mode) for mode in MODES},
    **{
        f"rows, {mode}, padding": lambda mode=mode: Rows(mode=mode, padding_idx=2) for mode in MODES
    },
    "rows, weighted": lambda: Rows(mode="sum", weighted=True),
    "rows, fp16": lambda: Rows(mode="sum", dtype=torch.float16, ids=torch.int32),
    **{f"bags, {mode}": lambda mode=mode: Bags(mode=mode) for mode in MODES},
    **{
        f"bags, {mode}, padding, last": lambda mode=mode: Bags(
            mode=mode, padding_idx=2, include_last_offset=True
        )
        for mode in MODES
    },
    "bags, weighted, padding, last": lambda: Bags(
        mode="sum", weighted=True, padding_idx=-1, include_last_offset=True
    ),
    "bags, int16 offsets": lambda: Bags(mode="mean", offsets=torch.int16),
    "tables": lambda: Tables(),
    "tables, per table": lambda: Tables(**PER_TABLE),
    "tables, features": lambda: Tables(features=FEATURES, **PER_TABLE),
    "tables, one dim, max": lambda: Tables(sizes=UNIFORM, mode="max", padding_idx=1),
    "tables, weighted": lambda: Tables(weighted=True, padding_idx=1),
    "tables, fp16 output": lambda: Tables(mode="mean", output_dtype=torch.float16),
    "tables, sparse": lambda: Tables(sparse=True),
    "tables, padded": lambda: Padded(**PER_TABLE),
    "rows of tables": lambda: Tables(pooled=False, sizes=UNIFORM, padding_idx=1),
    "rows of tables, padded": lambda: Padded(pooled=False, sizes=UNIFORM),
    "swapped": lambda: Swapped(),
    "quantized lookup": lambda: Quantized(Lookup(ids=torch.int16)),
    "quantized lookup, int4": lambda: Quantized(Lookup(padding_idx=1), bits=4),
    "quantized lookup, groups": lambda: Quantized(Lookup(dim=70), bits=4, group=32),
    "quantized lookup, fp16": lambda: Quantized(Lookup(dim=70, dtype=torch.float16), group=32),
    "quantized rows, padding": lambda: Quantized(Rows(mode="mean", padding_idx=2), bits=4),
    "quantized bags, weighted, last": lambda: Quantized(
        Bags(mode="sum", weighted=True, padding_idx=2, include_last_offset=True)
    ),
    "quantized bags, max": lambda: Quantized(Bags(mode="max"), bits=4),
    "quantized tables": lambda: Quantized(Tables(**PER_TABLE), bits=4),
    "quantized tables, one dim": lambda: Quantized(Tables(sizes=UNIFORM)),
    "quantized tables, padded": lambda: Quantized(Padded(**PER_TABLE)),
    "quantized rows of tables": lambda: Quantized(Tables(pooled=False, sizes=UNIFORM), bits=4),
}


def made(name):
    return with_integers(CASES[name]())


def operators(program):
    """The names of all operators in a program's graphs."""
    return {
        getattr(node.target, "__name__", str(node.target))
        if not isinstance(node.target, torch._ops.OpOverload)
        else str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


def is_torchs(name):
    return name.startswith(("aten.", *OF_SIZES))


class Together(torch.nn.Module):
    """Several of these models in one program: their inputs and outputs, one after the other."""

    def __init__(self, names):
        super().__init__()
        self.models = torch.nn.ModuleList(made(name) for name in names)
        self.dynamic = tuple(spec for model in self.models for spec in model.dynamic)

    def batch(self, size):
        return tuple(one for model in self.models for one in model.batch(size))

    def forward(self, *batch):
        outputs, begin = [], 0
        for model in self.models:
            end = begin + len(model.dynamic)
            outputs.append(model(*batch[begin:end]))
            begin = end
        return tuple(outputs)


def exported(model, size=4, dynamic=True, strict=False):
    """The program of one of these models."""
    shapes = model.dynamic if dynamic else None
    if shapes is not None and type(model).forward in (
        Tables.forward,
        Quantized.forward,
        Together.forward,
    ):
        shapes = (shapes,)  # of *batch
    return torch.export.export(model, model.batch(size), dynamic_shapes=shapes, strict=strict)
