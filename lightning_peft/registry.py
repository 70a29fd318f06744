"""The one table: every paper of the suite, what implements it, and what its tests show.

It imports nothing but the standard library, so that `lightning-peft list`, the docs and the conformance suite read it
without loading a component. A technique is registered by giving its row `components`; tests and docs follow from that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: What a component is, and so how it is used (`WAYS_OF_USE`) and tested.
KINDS = ("mixin", "callback", "datamodule", "function", "layer", "metric", "study", "module")

#: Columns of the conformance suite; `Component.not_applicable` names the ones that make no sense, with the reason.
COLUMNS = (
    "subclass",
    "yaml",
    "drop-in",
    "fp32",
    "bf16-mixed",
    "bf16-true",
    "ddp",
    "fsdp2",
    "accumulation",
    "resume",
    "save",
    "export",
    "frozen",
    "stages",
    "manual",
    "two",
    "teardown",
    "composition",
)

#: How a component of each kind is used (FINDINGS, 24); the conformance suite tests each way.
WAYS_OF_USE: Mapping[str, tuple[str, ...]] = {
    "mixin": ("subclass", "yaml"),
    "callback": ("yaml", "drop-in"),
    "datamodule": ("subclass", "yaml", "drop-in"),
    "module": ("subclass", "yaml"),
    "layer": ("yaml", "drop-in"),
}


@dataclass(frozen=True)
class Example:
    """A tiny run that shows a component at work, as plain data; the conformance suite runs it.

    Args:
        network: Family of the tiny network: "llama", "gpt2", "bert", "t5", "vit", "mixtral".
        module: The ready LightningModule around it.
        arguments: Arguments of the component; of a layer's config without its `peft_type`, for it runs through
            `callbacks.PEFT`.
        data: "tokens" (random ids with labels), "faults", "reasoning", "classes", "pairs", "images", "image_pairs",
            "traces", "documents", "text", "wrong_text", "trace_text", "document_text", "pair_text" or "edit_text"
            (rows for a DataModule), "none" (its own).
        module_arguments: Further arguments of the module.
        trains: Regular expression of the names that training may change; everything else must not move.
        second: Arguments of a second callback of the class in the same run (for a layer, of `callbacks.PEFT`).
    """

    network: str = "llama"
    module: str = "CausalLM"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: str = "tokens"
    module_arguments: Mapping[str, Any] = field(default_factory=dict)
    trains: str = ""
    second: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Component:
    """One public class or function.

    Args:
        path: Import path, the name included.
        kind: One of `KINDS`.
        example: What the conformance suite runs; `None` leaves it to the unit tests.
        not_applicable: Column of the conformance suite -> why it does not apply.
        ready: For a mixin, the import path of its ready LightningModule (for YAML).
    """

    path: str
    kind: str
    example: Example | None = None
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    ready: str | None = None

    @property
    def name(self) -> str:
        """The class's or function's own name."""
        return self.path.rpartition(".")[2]

    def load(self) -> Any:
        """Imports the component."""
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Technique:
    """One paper.

    Args:
        paper: Its number.
        title: Its title.
        components: What implements it, the lead first; empty while it is not built.
        works: What the tests show, in a line.
    """

    paper: int
    title: str
    components: tuple[Component, ...] = ()
    works: str = "not built yet"

    def row(self) -> dict[str, Any]:
        """The lead component as plain data, under the keys of `lightning-peft list`."""
        lead = self.components[0] if self.components else None
        return {
            "paper": self.paper,
            "title": self.title,
            "component": lead.name if lead else None,
            "kind": lead.kind if lead else None,
            "path": lead.path if lead else None,
            "works": self.works,
        }


def technique(paper: int) -> Technique:
    """The row of a paper.

    Raises:
        KeyError: There is no such number.
    """
    if not 1 <= paper <= len(TECHNIQUES):
        raise KeyError(f"paper {paper} is not in the registry: the papers are numbered 1 to {len(TECHNIQUES)}.")
    return TECHNIQUES[paper - 1]


def components() -> Iterator[tuple[int | None, Component]]:
    """Every public component with its paper's number, `None` for what serves all papers."""
    for row in TECHNIQUES:
        yield from ((row.paper, component) for component in row.components)
    yield from ((None, component) for component in SHARED)


TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        1,
        "Improving large language models with concept-aware fine-tuning",
        (
            Component(
                "lightning_peft.objectives.concept_aware.ConceptAwareFineTuningMixin",
                "mixin",
                Example(
                    arguments={"predicted_tokens": 3, "heads_init": "copy", "heads_coefficient": 0.1},
                    trains=r"^model\.",
                ),
                ready="lightning_peft.objectives.concept_aware.ConceptAwareCausalLM",
            ),
            Component(
                "lightning_peft.objectives.concept_aware.AuxiliaryHeadPretrainingMixin",
                "mixin",
                Example(arguments={"predicted_tokens": 3}, trains=r"^auxiliary_heads\."),
                ready="lightning_peft.objectives.concept_aware.AuxiliaryHeadPretrainingCausalLM",
            ),
            Component(
                "lightning_peft.callbacks.concept_aware.AuxiliaryHeadSchedule",
                "callback",
                Example(
                    module="ConceptAwareCausalLM",
                    module_arguments={"predicted_tokens": 3, "heads_init": "copy", "finetune_heads": True},
                    arguments={"heads_epochs": 1, "heads_learning_rate": 0.05, "heads_warmup_steps": 1},
                    trains=r"^(model|auxiliary_heads)\.",
                ),
                {
                    "drop-in": "needs a module with auxiliary heads; refuses others by name",
                    "manual": "needs a module with auxiliary heads; refuses others by name",
                    "two": "a run has one first stage",
                },
            ),
            Component(
                "lightning_peft.callbacks.concept_aware.AuxiliaryHeadCheckpoint",
                "callback",
                Example(
                    module="ConceptAwareCausalLM",
                    module_arguments={"predicted_tokens": 3, "heads_init": "copy"},
                    second={"path": "best.safetensors", "monitor": "val_multi_token_loss"},
                    trains=r"^model\.",
                ),
                {
                    "drop-in": "needs a module with auxiliary heads; refuses others by name",
                    "manual": "needs a module with auxiliary heads; refuses others by name",
                },
            ),
            Component(
                "lightning_peft.datamodules.self_distillation.SelfDistillationData",
                "datamodule",
                Example(arguments={"max_length": 32, "batch_size": 2, "unfinished": "keep"}, data="text"),
            ),
            Component("lightning_peft.objectives.concept_aware.MultiTokenLoss", "metric"),
        ),
        "loss and heads equal the paper's equations; heads transfer between runs; kills, DDP and FSDP2 change nothing",
    ),
    Technique(2, "Motion-Aware Concept Alignment for Consistent Video Editing"),
    Technique(
        3,
        "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers",
        (
            Component(
                "lightning_peft.adapters.sparse_gin.SparseGINConfig",
                "layer",
                Example(
                    arguments={"hidden": 6, "scale_init": [0.1, 0.5], "dropout": 0.0},
                    second={"config": {"peft_type": "SPARSE_GIN", "hidden": 4}, "adapter_name": "other"},
                    trains=r"sparse_gin_",
                ),
            ),
            Component("lightning_peft.adapters.graph_aware_attention.GraphAwareAttention", "layer"),
        ),
        "equal to a computation edge by edge, no token reads a later one; loads in plain peft on five families",
    ),
    Technique(4, "Dual Modality Prompt Tuning for Vision-Language Pre-Trained Model"),
    Technique(5, "OSTAF: A One-Shot Tuning Method for Improved Attribute-Focused T2I Personalization"),
    Technique(6, "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models"),
    Technique(7, "JEN-1 DreamStyler: Customized Musical Concept Learning via Pivotal Parameters Tuning"),
    Technique(8, "ClassDiffusion: More Aligned Personalization Tuning with Explicit Class Guidance"),
    Technique(9, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks"),
    Technique(10, "Multi-Concept Customization of Text-to-Image Diffusion"),
    Technique(11, "Sparse Concept Bottleneck Models: Gumbel Tricks in Contrastive Learning"),
    Technique(12, "Towards Alignment-Centric Paradigm: A Survey of Instruction Tuning in Large Language Models"),
    Technique(13, "ELITE: Encoding Visual Concepts into Textual Embeddings for Customized Text-to-Image Generation"),
    Technique(14, "Tune As You Scale: Hyperparameter Optimization For Compute Efficient Training"),
    Technique(15, "Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer"),
    Technique(
        16,
        "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval",
        (
            Component(
                "lightning_peft.adapters.connected.ConnectedAdapterConfig",
                "layer",
                Example(
                    arguments={"bottleneck": 4, "inside": 4, "feeds": "head"},
                    second={
                        "config": {"peft_type": "CONNECTED", "bottleneck": 3, "inside": 0},
                        "adapter_name": "other",
                    },
                    trains=r"connected_",
                ),
            ),
        ),
        "equal to the recursion by hand; gradient reaches the first block beside a detached network; no retrieval yet",
    ),
    Technique(17, "ConceptMoE: Adaptive Token-to-Concept Compression for Implicit Compute Allocation"),
    Technique(
        18,
        "Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning",
        (
            Component(
                "lightning_peft.callbacks.concept_ablation.ConceptAblation",
                "callback",
                Example(
                    arguments={"directions": "random", "layers": [0], "components": 3},
                    second={"directions": "random", "layers": [1], "components": 2},
                ),
            ),
            Component("lightning_peft.concepts.directions.activation_difference_pca", "function"),
            Component("lightning_peft.concepts.directions.sae_decoder_directions", "function"),
            Component("lightning_peft.concepts.directions.attribution_rank", "function"),
        ),
        "nothing along the directions in training's forward and backward; the good cue is learnt where the bad one is "
        "ablated; PCA equals scikit-learn's",
    ),
    Technique(
        19,
        "R-Tuning: Teaching Large Language Models to Refuse Unknown Questions",
        (
            Component(
                "lightning_peft.datamodules.refusal_aware.RefusalAwareData",
                "datamodule",
                Example(
                    arguments={"max_length": 64, "generation": {"max_new_tokens": 3}, "loss_on": "all"}, data="text"
                ),
            ),
            Component("lightning_peft.datamodules.refusal_aware.CertaintyAveragePrecision", "metric"),
            Component("lightning_peft.datamodules.refusal_aware.WillingAccuracy", "metric"),
            Component("lightning_peft.datamodules.refusal_aware.certainty", "function"),
        ),
        "sure of just what the network knew, whatever the order; a tuned toy is surer of held-out facts it knows",
    ),
    Technique(20, "Error-driven Data-efficient Large Multimodal Model Tuning"),
    Technique(
        21,
        "LoKI: Low-damage Knowledge Implanting of Large Language Models",
        (
            Component(
                "lightning_peft.callbacks.loki.LoKI",
                "callback",
                Example(
                    arguments={"quota": 20.0, "questions": [[5, 9, 30, 41], [7, 8], [60, 61, 62]]},
                    trains=r"down_proj\.weight$",
                ),
                {"two": "two selections of the same weights refuse each other"},
            ),
            Component("lightning_peft.attribution.knowledge_vectors.attributions", "function"),
            Component("lightning_peft.selecting.select", "function"),
        ),
        "attribution equals captum's and adds up; the lowest rows of every layer train alone; scores by command or "
        "before the fit",
    ),
    Technique(22, "KnowPrompt: Knowledge-aware Prompt-tuning with Synergistic Optimization for Relation Extraction"),
    Technique(23, "Parameter-Efficient Fine-Tuning for Foundation Models"),
    Technique(
        24,
        "Teaching LLMs How to Learn with Contextual Fine-Tuning",
        (
            Component(
                "lightning_peft.datamodules.contextual.ContextualData",
                "datamodule",
                Example(
                    arguments={
                        "data": [{"text": " ".join(f"w{(i + j) % 40}" for j in range(2 + i % 7))} for i in range(36)],
                        "validation": [{"text": f"w{i} yes"} for i in range(6)],
                        "test": [{"text": f"w{i} no"} for i in range(6)],
                        "prompts": ["question", "answer yes", "hello good world"],
                    },
                    data="none",
                ),
            ),
        ),
        "labels of a document are those without a prompt; an empty prompt is continued pre-training to the bit",
    ),
    Technique(25, "Post-hoc Concept Bottleneck Models"),
    Technique(26, "Optimizing the Interface Between Knowledge Graphs and LLMs for Complex Reasoning"),
    Technique(27, "Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion"),
    Technique(28, "Choice of PEFT Technique in Continual Learning: Prompt Tuning is Not All You Need"),
    Technique(29, "From Symbolic Tasks to Code Generation: Diversification Yields Better Task Performers"),
    Technique(30, "What to Pre-Train on? Efficient Intermediate Task Selection"),
    Technique(31, "RA-DIT: Retrieval-Augmented Dual Instruction Tuning"),
    Technique(
        32,
        "One Adapter for All Programming Languages? Adapter Tuning for Code Search and Summarization",
        (Component("lightning_peft.adapters.bottleneck.BottleneckConfig", "layer"),),
        "the sequential adapters of paper 38, in Houlsby's form, with an example; its benchmark is not built yet",
    ),
    Technique(
        33,
        "Training Large Language Models To Reason In Parallel With Global Forking Tokens",
        (
            Component(
                "lightning_peft.objectives.set_supervised.SetSupervisedMixin",
                "mixin",
                Example(
                    arguments={"ssft_tags": ["red", "green", "blue"], "ssft_match_tokens": 5},
                    data="traces",
                    trains=r"^model\.",
                ),
                {"composition": "its rows are questions with their traces; its own tests show it beside another"},
                ready="lightning_peft.objectives.set_supervised.SetSupervisedCausalLM",
            ),
            Component(
                "lightning_peft.datamodules.trace_set.TraceSetData",
                "datamodule",
                Example(
                    module="SetSupervisedCausalLM",
                    module_arguments={"ssft_tags": ["red", "green", "blue"]},
                    arguments={"tag_text": "red \n", "max_length": 32},
                    data="trace_text",
                    trains=r"^model\.",
                ),
            ),
            Component(
                "lightning_peft.callbacks.parallel_tag_generation.ParallelTagGeneration",
                "callback",
                Example(
                    module="SetSupervisedCausalLM",
                    module_arguments={"ssft_tags": ["red", "green", "blue"]},
                    arguments={
                        "questions": [{"prompt": "a b ", "answer": "c"}, {"prompt": "d ", "answer": "e"}],
                        "tags": ["red", "green", "blue"],
                        "answer_pattern": "(\\w+)",
                        "generation": {"max_new_tokens": 2},
                    },
                    second={"questions": [{"prompt": "a ", "answer": "c"}], "tags": ["red"]},
                    data="traces",
                    trains=r"^model\.",
                ),
                {
                    "drop-in": "needs a module with a tokenizer; refuses others by name",
                    "manual": "needs a module with a tokenizer; refuses others by name",
                },
            ),
            Component("lightning_peft.objectives.set_supervised.match_traces", "function"),
        ),
        "matching of least cost, blind to the order of traces; tags become one-to-one with ways of reasoning on a toy",
    ),
    Technique(
        34,
        "Fine-tuning Done Right in Model Editing",
        (
            Component(
                "lightning_peft.callbacks.localized_editing.LocalizedEditing",
                "callback",
                Example(arguments={"layers": [1], "modules": "down_proj"}, trains=r"layers\.1\.mlp\.down_proj\."),
                {
                    "two": "two selections of the same weights refuse each other",
                    "teardown": "metrics that a weighted loss has logged stay, as any objective's do",
                },
            ),
            Component(
                "lightning_peft.callbacks.edit_evaluation.EditEvaluation",
                "callback",
                Example(
                    arguments={
                        "edits": [{"prompt": "a b", "target_new": "c", "rephrase": "b a", "locality": "d e"}],
                        "max_new_tokens": 2,
                    },
                    second={"edits": [{"prompt": "a", "target_new": "b"}] * 2, "max_new_tokens": 2},
                ),
                {
                    "drop-in": "needs a module with a tokenizer; refuses others by name",
                    "manual": "needs a module with a tokenizer; refuses others by name",
                },
            ),
            Component(
                "lightning_peft.datamodules.edits.EditData",
                "datamodule",
                Example(arguments={"max_length": 32}, data="edit_text"),
            ),
            Component("lightning_peft.callbacks.localized_editing.sweep_locations", "function"),
        ),
        "one place by exact layer; learnt steps move nothing; breadth-first keeps edits that depth-first loses",
    ),
    Technique(35, "Neural Prompt Search"),
    Technique(36, "Hateful Meme Detection through Context-Sensitive Prompting and Fine-Grained Labeling"),
    Technique(37, "Editable User Profiles for Controllable Text Recommendation"),
    Technique(
        38,
        "Towards a Unified View of Parameter-Efficient Transfer Learning",
        (
            Component(
                "lightning_peft.adapters.bottleneck.BottleneckConfig",
                "layer",
                Example(
                    arguments={"bottleneck": 4},
                    second={  # the two together are MAM
                        "config": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2},
                        "adapter_name": "mam",
                    },
                    trains=r"bottleneck_",
                ),
            ),
        ),
        "equal to the formulas on Llama, BERT, GPT-2; MAM equals PEFT's prefix with the adapter; loads in plain peft",
    ),
    Technique(39, "Concept-Aware Batch Sampling Improves Language-Image Pretraining"),
    Technique(40, "Q-Tuning: Queue-based Prompt Tuning for Lifelong Few-shot Language Learning"),
    Technique(41, "DePT: Decoupled Prompt Tuning"),
    Technique(
        42,
        "BayesPrompt: Prompting Large-Scale Pre-Trained Language Models on Few-shot Inference via "
        "Debiased Domain Abstraction",
    ),
    Technique(43, "InfoPrompt: Information-Theoretic Soft Prompt Tuning for Natural Language Understanding"),
    Technique(44, "Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning"),
    Technique(
        45,
        "Parameter Efficient Tuning Allows Scalable Personalization of LLMs for Text Entry: A Case "
        "Study on Abbreviation Expansion",
    ),
    Technique(46, "Large Language Models Are Reasoning Teachers"),
    Technique(47, "Repurposing Language Models into Embedding Models: Finding the Compute-Optimal Recipe"),
    Technique(48, "Nonparametric Identification of Latent Concepts"),
    Technique(49, "Get more for less: Principled Data Selection for Warming Up Fine-Tuning in LLMs"),
    Technique(
        50,
        "The CoT Collection: Improving Zero-shot and Few-shot Learning of Language Models via "
        "Chain-of-Thought Fine-Tuning",
    ),
    Technique(51, "Can LLMs Learn New Concepts Incrementally without Forgetting?"),
    Technique(
        52,
        "AnalogSeeker: An Open-source Foundation Language Model for Analog Circuit Design",
        (
            Component(
                "lightning_peft.objectives.self_constrained.SelfConstrainedMixin",
                "mixin",
                Example(arguments={"nsc_weight": 0.5}, trains=r"^model\."),
                ready="lightning_peft.objectives.self_constrained.SelfConstrainedCausalLM",
            ),
            Component(
                "lightning_peft.datamodules.reference_data.ReferenceData",
                "datamodule",
                Example(
                    module="SelfConstrainedCausalLM",
                    module_arguments={"nsc_weight": 0.5, "nsc_reference": "cached"},
                    arguments={"max_length": 32, "batch_size": 2, "reference_top_k": 8},
                    data="text",
                ),
            ),
            Component(
                "lightning_peft.datamodules.learning_nodes.LearningNodeDistillation",
                "datamodule",
                # A generator that gives each request back: what is learnt is made of the requests' own words.
                Example(
                    arguments={
                        "generator": "builtins.list",
                        "nodes_request": "- {text}",
                        "questions_request": "- {node} yes\n- {node} no",
                        "solution_request": "the {question} \nAnswer: {node}",
                        **{
                            split: [{"text": f"{word} w{i}"} for i in range(n)]
                            for split, word, n in (("data", "cat", 18), ("validation", "dog", 3), ("test", "mat", 6))
                        },
                    },
                    data="none",
                ),
            ),
        ),
        "KL to the starting network equals F.kl_div both ways, from a copy, switched-off adapters or cached top k; "
        "kills keep the start; texts become questions with worked answers in three passes that resume, losses told",
    ),
    Technique(53, "Fictitious Synthetic Data Can Improve LLM Factuality via Prerequisite Learning"),
    Technique(
        54,
        "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models",
        (
            Component(
                "lightning_peft.callbacks.dsee.DSEE",
                "callback",
                Example(
                    arguments={"r": 4, "num_sparse": 8, "prune_after": 1, "sparsity": 0.3, "sparsity_others": 0.1},
                    second={
                        "r": 2,
                        "num_sparse": 4,
                        "target_modules": ["q_proj", "v_proj", "o_proj"],
                        "positions": "magnitude",
                        "prune": "structured",
                        "prune_after": 1,
                        "heads": 1,
                        "adapter_name": "other",
                    },
                    trains=r"dsee_",
                ),
                {"teardown": "the adapter stays on the module, where validation and export need it"},
            ),
            Component(
                "lightning_peft.adapters.dsee.DSEEConfig",
                "layer",
                Example(
                    "gpt2",
                    arguments={"r": 4, "num_sparse": 8, "positions": "random"},
                    second={
                        "config": {"peft_type": "DSEE", "r": 2, "num_sparse": 4, "prune": "none"},
                        "adapter_name": "other",
                    },
                    trains=r"dsee_",
                ),
            ),
            Component("lightning_peft.adapters.dsee_pruning.remove_heads", "function"),
        ),
        "S2's gradient is dW at its places; masks equal torch's pruning; stages survive kills; heads are cut for real",
    ),
    Technique(55, "DART-Math: Difficulty-Aware Rejection Tuning for Mathematical Problem-Solving"),
    Technique(
        56,
        "SliceFine: The Universal Winning-Slice Hypothesis for Pretrained Networks",
        (
            Component(
                "lightning_peft.callbacks.slice_fine.SliceFine",
                "callback",
                Example(
                    arguments={"rank": 3, "orientation": "alternate", "interval": 2},
                    trains=r"_proj\.weight$|\.(c_attn|c_fc)\.weight$",
                ),
                {"two": "two selections of the same weights refuse each other"},
            ),
        ),
        "slices equal masked full fine-tuning, their gradients and moments have the slices' size; kills, DDP, FSDP2",
    ),
    Technique(57, "LESS: Selecting Influential Data for Targeted Instruction Tuning"),
    Technique(
        58,
        "HFT: Half Fine-Tuning for Large Language Models",
        (
            Component(
                "lightning_peft.callbacks.half_finetuning.HalfFineTuning",
                "callback",
                Example(
                    arguments={"reselect": "epoch", "train_embeddings": False},
                    trains=r"^model\.(model\.(layers|norm)|transformer\.(h|ln_f))\.",
                ),
                {"two": "two selections of the same weights refuse each other"},
            ),
            Component("lightning_peft.merging.half_reset.half_reset", "function"),
        ),
        "exact counts by category, a new half per epoch or stage without touching schedule or kept moments; kills, "
        "DDP, "
        "FSDP2; half_reset",
    ),
    Technique(59, "Selecting Informative Contexts Improves Language Model Finetuning"),
    Technique(60, "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning"),
    Technique(61, "APE: A Data-Centric Benchmark for Efficient LLM Adaptation in Text Summarization"),
    Technique(
        62,
        "Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models",
        (Component("lightning_peft.choosing.choose", "function"),),
        "findings as rules of `lightning-peft choose`; its comparison at equal steps in benchmarks/code_generation.py",
    ),
    Technique(63, "TST^R: Target Similarity Tuning Meets the Real World"),
    Technique(64, "DELIFT: Data Efficient Language model Instruction Fine Tuning"),
    Technique(65, "Explore Spurious Correlations at the Concept Level in Language Models for Text Classification"),
    Technique(66, "Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models"),
    Technique(67, "Concept Conductor: Orchestrating Multiple Personalized Concepts in Text-to-Image Synthesis"),
    Technique(
        68,
        "QFFT, Question-Free Fine-Tuning for Adaptive Reasoning",
        (
            Component(
                "lightning_peft.datamodules.question_free.QuestionFreeData",
                "datamodule",
                Example(arguments={"add_eos": True}, data="text"),
            ),
            Component("lightning_peft.datamodules.question_free.ReasoningAdaptabilityKappa", "metric"),
            Component("lightning_peft.datamodules.question_free.length_change", "function"),
        ),
        "no token of question, system text or header in any training row; kappa equals scikit-learn's",
    ),
    Technique(69, "Encoder-based Domain Tuning for Fast Personalization of Text-to-Image Models"),
    Technique(70, "LoPT: Low-Rank Prompt Tuning for Parameter Efficient Language Models"),
    Technique(71, "Discover-then-Name: Task-Agnostic Concept Bottlenecks via Automated Concept Discovery"),
    Technique(72, "Prompt Tuned Embedding Classification for Multi-Label Industry Sector Allocation"),
    Technique(73, "Can we Constrain Concept Bottleneck Models to Learn Semantically Meaningful Input Features?"),
    Technique(74, "Low-Rank Continual Personalization of Diffusion Models"),
    Technique(75, "Enhancing the Reasoning Capabilities of Small Language Models via Solution Guidance Fine-Tuning"),
    Technique(
        76,
        "Empirical Analysis of the Strengths and Weaknesses of PEFT Techniques for LLMs",
        (
            Component(
                "lightning_peft.callbacks.bitfit.BitFit",
                "callback",
                Example("gpt2", trains=r"\.bias$"),
                {"two": "two selections of the same weights refuse each other"},
            ),
            Component("lightning_peft.choosing.choose", "function"),
        ),
        "BitFit: biases alone, and a task's head; findings as rules of `lightning-peft choose`; its comparison over "
        "amounts of data in benchmarks/peft_table.py",
    ),
    Technique(77, "TAIL: Task-specific Adapters for Imitation Learning with Large Pretrained Models"),
    Technique(
        78,
        "Symbol tuning improves in-context learning in language models",
        (
            Component(
                "lightning_peft.datamodules.symbol_tuning.SymbolTuningData",
                "datamodule",
                Example(
                    arguments={
                        "data": [{"input": f"w{i} w{i * 7 % 40}", "label": ("yes", "no")[i % 2]} for i in range(36)],
                        "validation": [{"input": f"a w{i}", "label": ("yes", "no")[i % 2]} for i in range(6)],
                        "test": [{"input": f"b w{i}", "label": ("yes", "no")[i % 2]} for i in range(6)],
                        "kinds": ["words"],
                        "words": ["red", "green", "blue", "cat", "dog", "mat"],
                        "evaluation_words": ["one", "two", "three", "four"],
                        "per_class": [1, 3],
                        "evaluation_exemplars": 2,
                    },
                    data="none",
                ),
            ),
            Component("lightning_peft.datamodules.symbol_tuning.InContextAccuracy", "metric"),
            Component("lightning_peft.datamodules.symbol_tuning.chosen_labels", "function"),
        ),
        "symbols of training and evaluation disjoint, none another's beginning; a tuned toy follows flipped labels",
    ),
    Technique(79, "How to Set the Learning Rate for Large-Scale Pre-training?"),
    Technique(80, "Low-rank finetuning for LLMs: A fairness perspective"),
    Technique(
        81,
        "Meta-Learning Online Adaptation of Language Models",
        (
            Component(
                "lightning_peft.objectives.meta_weighting.MetaTokenWeightingMixin",
                "mixin",
                Example(
                    arguments={"meta_rate": 0.1, "meta_documents": 12, "meta_reset_every": 12},
                    data="documents",
                    trains=r"^token_weights\.",
                ),
                {
                    "accumulation": "an inner step is one on the documents of a batch",
                    "ddp": "an inner step is one on the documents of a rank's batch",
                    "fsdp2": "steps on whole parameters: refused by name",
                    "composition": "replaces the step; others act on its outer loss, which its own tests show",
                },
                ready="lightning_peft.objectives.meta_weighting.MetaTokenWeightingCausalLM",
            ),
            Component(
                "lightning_peft.objectives.online_adaptation.OnlineAdaptationMixin",
                "mixin",
                Example(
                    arguments={"adapt_weights": "tfidf", "adapt_corpus": ["cat dog", "cat yes", "red green w20 w30"]},
                    trains=r"^model\.",
                ),
                ready="lightning_peft.objectives.online_adaptation.OnlineAdaptationCausalLM",
            ),
            Component(
                "lightning_peft.datamodules.document_questions.DocumentQuestionData",
                "datamodule",
                Example(
                    module="MetaTokenWeightingCausalLM",
                    module_arguments={"meta_rate": 0.02, "meta_documents": 12, "meta_reset_every": 12},
                    arguments={"unrelated": [{"text": "red green blue"}, {"text": "cat dog"}], "max_length": 32},
                    data="document_text",
                    trains=r"^token_weights\.",
                ),
                {
                    "accumulation": "an inner step is one on the documents of a batch",
                    "ddp": "an inner step is one on the documents of a rank's batch",
                    "fsdp2": "the module steps on whole parameters",
                },
            ),
            Component(
                "lightning_peft.callbacks.question_answering.QuestionAnswering",
                "callback",
                Example(
                    arguments={
                        "questions": [{"prompt": "a b ", "answer": "c"}, {"prompt": "d ", "answer": "e"}],
                        "generation": {"num_beams": 2, "max_new_tokens": 2},
                    },
                    second={"questions": [{"prompt": "a ", "answer": "c"}], "prefix_match": True},
                    trains=r"^model\.",
                ),
                {
                    "drop-in": "needs a module with a tokenizer; refuses others by name",
                    "manual": "needs a module with a tokenizer; refuses others by name",
                },
            ),
        ),
        "meta-gradients equal unrolled autograd and finite differences; resets exact over kills; facts outweigh filler",
    ),
    Technique(82, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning"),
    Technique(83, "AnyTaskTune: Advanced Domain-Specific Solutions through Task-Fine-Tuning"),
    Technique(84, "Approximated Prompt Tuning for Vision-Language Pre-trained Models"),
    Technique(
        85,
        "Model Stock: All we need is just a few fine-tuned models",
        (
            Component("lightning_peft.merging.model_stock.model_stock", "function"),
            Component("lightning_peft.merging.merge", "function"),
            Component(
                "lightning_peft.callbacks.model_stock.ModelStock",
                "callback",
                Example(arguments={"period": 2}, trains=r"^model\."),
                {"two": "two would average models that take turns: refused by name"},
            ),
        ),
        "equal to mergekit's result from disk to disk, streamed; models that take turns in one run, exact over kills",
    ),
    Technique(86, "Learning to Generate Research Idea with Dynamic Control"),
    Technique(
        87,
        "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
        (
            Component(
                "lightning_peft.callbacks.kasa.KaSA",
                "callback",
                Example(
                    arguments={"r": 4, "beta": 0.01, "gamma": 0.01, "target_modules": ["q_proj", "v_proj"]},
                    second={"r": 2, "target_modules": ["o_proj"], "adapter_name": "other"},
                    trains=r"lora_",
                ),
                {
                    "teardown": "the adapter stays on the module, where validation and export need it",
                    "manual": "adds terms to the loss that only automatic optimisation sees; refuses by name",
                },
            ),
        ),
        "both regularisers equal PEFT's and a hand computation; the truncated base is in every checkpoint, also deltas",
    ),
    Technique(
        88,
        "Adapt Once, Thrive with Updates: Transferable Parameter-Efficient Fine-Tuning on Evolving Base Models",
        (
            Component(
                "lightning_peft.callbacks.trans_peft.TransPEFT",
                "callback",
                Example(arguments={"drop_probability": 0.3}),
                {
                    "two": "two would mask and drop the same parts; the second is refused",
                    "accumulation": "every micro-batch draws what is dropped anew, as dropout does",
                },
            ),
        ),
        "masked neurons and dropped feed-forward parts equal the network without them; draws survive resume and "
        "activation checkpointing",
    ),
    Technique(89, "DPTDR: Deep Prompt Tuning for Dense Passage Retrieval"),
    Technique(90, "Effectiveness of Data Augmentation for Parameter Efficient Tuning with Limited Data"),
    Technique(91, "Unified Vision and Language Prompt Learning"),
    Technique(92, "ILLUME: Rationalizing Vision-Language Models through Human Interactions"),
    Technique(
        93,
        "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
        (
            Component(
                "lightning_peft.objectives.dynamic_fine_tuning.DynamicFineTuningMixin",
                "mixin",
                Example(arguments={"dft_floor": 0.1}, trains=r"^model\."),
                ready="lightning_peft.objectives.dynamic_fine_tuning.DynamicFineTuningCausalLM",
            ),
            Component("lightning_peft.objectives.dynamic_fine_tuning.dynamic_fine_tuning_weights", "function"),
        ),
        "gradient of -sum p / M exactly, loss and gradient equal TRL's dft; exact counts over packing and ranks",
    ),
    Technique(
        94,
        "FAIT: Fault-Aware Fine-Tuning for Better Code Generation",
        (
            Component(
                "lightning_peft.objectives.fault_aware.FaultAwareMixin",
                "mixin",
                Example(arguments={"fait_alpha": 2.0}, data="faults", trains=r"^model\."),
                ready="lightning_peft.objectives.fault_aware.FaultAwareCausalLM",
            ),
            Component("lightning_peft.objectives.fault_aware.importance", "function"),
            Component(
                "lightning_peft.datamodules.fault_pairs.FaultPairs",
                "datamodule",
                Example(
                    module="FaultAwareCausalLM",
                    arguments={"max_length": 32, "batch_size": 2},
                    data="wrong_text",
                ),
            ),
            Component(
                "lightning_peft.datamodules.fault_pairs.StandardLibraryFaultPairs",
                "datamodule",
                Example(
                    module="FaultAwareCausalLM",
                    arguments={"max_examples": 40, "max_length": 256, "batch_size": 2},
                    data="none",
                ),
            ),
        ),
        "masks exact on hand examples, weights equal the equation, the margin of correct over mutated functions grows "
        "faster than with plain fine-tuning; the formula of the importance is ours",
    ),
    Technique(
        95,
        "The Ultimate Guide to Fine-Tuning LLMs from Basics to Breakthroughs: An Exhaustive Review of "
        "Technologies, Research, Best Practices, Applied Research Challenges and Opportunities",
    ),
    Technique(96, "SUB: Benchmarking CBM Generalization via Synthetic Attribute Substitutions"),
    Technique(97, "Scaled Prompt-Tuning for Few-Shot Natural Language Generation"),
    Technique(98, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning"),
    Technique(99, "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs"),
    Technique(100, "Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts"),
    Technique(101, "Customized Generation Reimagined: Fidelity and Editability Harmonized"),
    Technique(
        102,
        "LookAhead Tuning: Safer Language Models via Partial Answer Previews",
        (
            Component(
                "lightning_peft.datamodules.look_ahead_tuning.LookAheadTuningData",
                "datamodule",
                Example(arguments={"preview_tokens": 2, "connector": " answer "}, data="text"),
            ),
            Component("lightning_peft.datamodules.look_ahead_tuning.FirstTokensShift", "metric"),
            Component("lightning_peft.datamodules.look_ahead_tuning.RefusalRate", "metric"),
        ),
        "previews are beginnings of the answer's own text; first tokens start likelier and move less",
    ),
    Technique(103, "Configurable Preference Tuning with Rubric-Guided Synthetic Data"),
    Technique(
        104,
        "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning",
        (
            Component(
                "lightning_peft.objectives.reasoning_highlighted.ReasoningHighlightedMixin",
                "mixin",
                Example(arguments={"rft_tau": 0.5}, data="reasoning", trains=r"^model\."),
                ready="lightning_peft.objectives.reasoning_highlighted.ReasoningHighlightedCausalLM",
            ),
            Component("lightning_peft.objectives.reasoning_highlighted.reasoning_weights", "function"),
            Component(
                "lightning_peft.datamodules.shuffle_discriminator.ShuffleDiscriminatedData",
                "datamodule",
                Example(
                    module="ReasoningHighlightedCausalLM",
                    arguments={"max_length": 32, "batch_size": 2, "shuffled_rows": 8, "shuffled_epochs": 1},
                    data="text",
                ),
            ),
        ),
        "tells f(x) from its frame on synthetic data by shuffled outputs; weights equal the equation in every scope",
    ),
    Technique(105, "CoLLEGe: Concept Embedding Generation for Large Language Models"),
    Technique(106, "Automatic Evaluation of Generative Models with Instruction Tuning"),
    Technique(
        107,
        "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with "
        "Semantic Calibration",
        (
            Component(
                "lightning_peft.objectives.distribution_regularized.DistributionRegularizedMixin",
                "mixin",
                Example(
                    "vit",
                    "ImageClassifier",
                    arguments={"dr_queue_size": 24, "dr_rotation_every": 2},
                    data="images",
                    trains=r"^model\.",
                ),
                ready="lightning_peft.objectives.distribution_regularized.DistributionRegularizedImageClassifier",
            ),
        ),
        "calibration recovers a known rotation; queue, counts and loss exact over micro-batches, ranks and kills",
    ),
    Technique(
        108,
        "Long-Short Chain-of-Thought Mixture Supervised Fine-Tuning Eliciting Efficient Reasoning in "
        "Large Language Models",
        (
            Component(
                "lightning_peft.datamodules.long_short_mixture.LongShortMixtureData",
                "datamodule",
                Example(
                    arguments={
                        split: [
                            {
                                "prompt": f"{ask} w{i} ",
                                "completion": f"<think> a b c d e f w{i} </think> w{i}",
                                "short": f"a w{i}",
                            }
                            for i in range(n)
                        ]
                        for split, ask, n in (("data", "question", 18), ("validation", "yes", 3), ("test", "no", 6))
                    },
                    data="none",
                ),
            ),
            Component("lightning_peft.datamodules.long_short_mixture.ReasoningEfficiency", "metric"),
            Component("lightning_peft.datamodules.long_short_mixture.why_rejected", "function"),
        ),
        "rewritings that change answer or order are left out; a tuned toy's lengths lie between long and short",
    ),
    Technique(
        109,
        "Make Prompt-based Black-Box Tuning Colorful: Boosting Model Generalization from Three Orthogonal Perspectives",
    ),
    Technique(
        110,
        "Selective Mixup Fine-Tuning for Optimizing Non-Decomposable Objectives",
        (
            Component(
                "lightning_peft.objectives.selective_mixup.SelectiveMixupMixin",
                "mixin",
                Example(
                    "vit",
                    "ImageClassifier",
                    arguments={"selmix_metric": "harmonic_mean", "selmix_every": 2},
                    data="image_pairs",
                    trains=r"^model\.",
                ),
                ready="lightning_peft.objectives.selective_mixup.SelectiveMixupImageClassifier",
            ),
            Component("lightning_peft.objectives.selective_mixup.pair_gains", "function"),
            Component("lightning_peft.objectives.selective_mixup.pair_distribution", "function"),
            Component("lightning_peft.objectives.confusion_metrics.ConfusionMetric", "metric"),
        ),
        "gains equal the paper's sums and raise the metric in a real step; pairs follow P exactly over kills and ranks",
    ),
    Technique(111, "Empowering Smaller Models: Tuning LLaMA and Gemma with Chain-of-Thought for Ukrainian Exam Tasks"),
    Technique(112, "Efficient Hyperparameter Tuning via Trajectory Invariance Principle"),
    Technique(
        113,
        "Parameter-Efficient Tuning with Special Token Adaptation",
        (
            Component(
                "lightning_peft.adapters.special_tokens.SpecialTokensConfig",
                "layer",
                Example(
                    arguments={"token_ids": [*range(5, 40)], "positions": 10},
                    second={
                        "config": {"peft_type": "SPECIAL_TOKENS", "share": "token", "token_ids": [7, 8]},
                        "adapter_name": "other",
                    },
                    trains=r"special_tokens_",
                ),
            ),
        ),
        "vectors on special tokens alone, counted row by row; gradients by hand; loads in plain peft on four families",
    ),
    Technique(
        114,
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
        (
            Component(
                "lightning_peft.callbacks.intrinsic_dimension.IntrinsicDimension",
                "callback",
                Example(arguments={"d": 64}, trains=r"."),
                {
                    "two": "two selections of the same weights refuse each other",
                    "fsdp2": "projects whole gradients of layers, which FSDP2 shards; refuses by name",
                    "frozen": "every weight moves, by numbers that the optimizer holds in the weights' place",
                },
            ),
            Component("lightning_peft.callbacks.intrinsic_dimension.apply_intrinsic", "function"),
            Component("lightning_peft.search.intrinsic_dimension.d90", "function"),
        ),
        "Fastfood equals its factors' product; numbers get projected gradients; a few kilobytes rebuild the network",
    ),
    Technique(115, "TuneTables: Context Optimization for Scalable Prior-Data Fitted Networks"),
    Technique(
        116,
        "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural "
        "Large Language Models",
        (
            Component(
                "lightning_peft.callbacks.expert_specialized.ExpertSpecialized",
                "callback",
                Example(
                    "mixtral",
                    arguments={"top_p": 0.5, "probe": [[5, 9, 30, 41], [7, 8], [60, 61, 62]]},
                    trains=r"mlp\.experts\.",
                ),
                {"two": "two selections of the same weights refuse each other"},
            ),
            Component("lightning_peft.attribution.expert_routing.routing_scores", "function"),
            Component("lightning_peft.attribution.expert_routing.relevant_experts", "function"),
        ),
        "the published choice of experts from the published scores; the chosen train with their size in memory",
    ),
    Technique(
        117,
        "Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation",
        (
            Component(
                "lightning_peft.callbacks.selective_lora.SelectiveLoRA",
                "callback",
                Example(
                    arguments={
                        "r": 4,
                        "target_modules": ["q_proj", "v_proj"],
                        "sparsity": 0.3,
                        "penalty_after": 1,
                        "penalty_unit": "step",
                    },
                    second={"r": 2, "target_modules": ["o_proj"], "adapter_name": "other"},
                    trains=r"lora_",
                ),
                {
                    "teardown": "the adapter stays on the module, where validation and export need it",
                    "manual": "adds a term to the loss that only automatic optimisation sees; refuses by name",
                },
            ),
        ),
        "gates by the straight-through formula; closed blocks add exactly nothing; open ones are saved as plain LoRA",
    ),
    Technique(
        118,
        "Exploring and Evaluating Personalized Models for Code Generation",
        (
            Component(
                "lightning_peft.callbacks.layer_freezing.LayerFreezing",
                "callback",
                Example(arguments={"train": ["last_block"]}, trains=r"\.(layers|h)\.1\."),
                {"two": "two selections of the same weights refuse each other"},
            ),
        ),
        "embeddings and head, last block or any role by name in Llama, GPT-2, BERT, T5, ViT; tied heads train together",
    ),
    Technique(119, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks"),
)

#: What serves all papers.
SHARED: tuple[Component, ...] = (
    Component("lightning_peft.models.fine_tuning_module.FineTuningModule", "module"),
    Component("lightning_peft.models.causal_lm.CausalLM", "module", Example("gpt2")),
    Component(
        "lightning_peft.models.sequence_classifier.SequenceClassifier",
        "module",
        Example("bert", "SequenceClassifier", data="classes"),
    ),
    Component(
        "lightning_peft.models.image_classifier.ImageClassifier",
        "module",
        Example("vit", "ImageClassifier", data="images"),
    ),
    Component(
        "lightning_peft.models.text_encoder.TextEncoder",
        "module",
        Example("bert", "TextEncoder", data="pairs"),
        {"accumulation": "in-batch negatives are those of the micro-batch"},
    ),
    Component(
        "lightning_peft.callbacks.peft.PEFT",
        "callback",
        Example(
            arguments={"config": {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}},
            second={
                "config": {"peft_type": "LORA", "r": 2, "target_modules": ["o_proj"]},
                "adapter_name": "other",
            },
            trains=r"lora_",
        ),
        {"teardown": "the adapter stays on the module, where validation and export need it"},
    ),
    Component(
        "lightning_peft.callbacks.delta_checkpoint.DeltaCheckpoint",
        "callback",
        Example(arguments={"filename": "delta"}, second={"filename": "other", "monitor": "val_loss"}),
    ),
    Component(
        "lightning_peft.callbacks.random_state.RandomState",
        "callback",
        Example(),
        {"two": "a run has one random state"},
    ),
    Component(
        "lightning_peft.callbacks.loss_curves.LossCurves",
        "callback",
        Example(second={"names": ["val_loss"], "path": "held_out.png"}),
    ),
    Component(
        "lightning_peft.callbacks.token_weight_viewer.TokenWeightViewer",
        "callback",
        Example(
            module="DynamicFineTuningCausalLM",
            arguments={"steps": [0, 2], "examples": 2},
            second={"steps": [1], "path": "second.html"},
        ),
        {
            "drop-in": "shows the weights of a CausalLM's tokens; refuses others by name",
            "manual": "shows the weights of a CausalLM's tokens; refuses others by name",
        },
    ),
    Component(
        "lightning_peft.callbacks.position_loss.PositionLoss",
        "callback",
        Example(second={"path": "rough.png", "smooth": 1}),
        {
            "drop-in": "reads the terms that a FineTuningModule's validation returns; refuses others by name",
            "manual": "reads the terms that a FineTuningModule's validation returns; refuses others by name",
        },
    ),
    Component(
        "lightning_peft.datamodules.instruction_data.InstructionData",
        "datamodule",
        Example(arguments={"max_length": 32, "batch_size": 2}, data="text"),
    ),
    Component(
        "lightning_peft.datamodules.image_data.ImageData",
        "datamodule",
        Example(
            "vit",
            "ImageClassifier",
            arguments={"image_size": 8, "channels": 1, "crop": 0.6, "flip": True},
            data="images",
            trains=r"^model\.",
        ),
    ),
    Component(
        "lightning_peft.datamodules.standard_library_code.StandardLibraryCode",
        "datamodule",
        Example(arguments={"max_examples": 36, "max_length": 512, "batch_size": 2}, data="none"),
    ),
    Component(
        "lightning_peft.datamodules.text_pairs.TextPairData",
        "datamodule",
        Example("bert", "TextEncoder", arguments={"max_length": 32}, data="pair_text"),
        {
            "accumulation": "in-batch negatives are those of the micro-batch",
            "drop-in": "a batch holds two texts a row; the suite's foreign modules read one",
        },
    ),
    Component(
        "lightning_peft.datamodules.text_pairs.StandardLibraryPairs",
        "datamodule",
        Example("bert", "TextEncoder", arguments={"max_examples": 36, "max_length": 64}, data="none"),
        {
            "accumulation": "in-batch negatives are those of the micro-batch",
            "drop-in": "a batch holds two texts a row; the suite's foreign modules read one",
        },
    ),
    Component("lightning_peft.kernels.linear_cross_entropy.linear_cross_entropy", "function"),
)
