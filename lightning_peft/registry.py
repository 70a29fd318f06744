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
)

#: How a component of each kind is used (FINDINGS, 24); the conformance suite tests each way.
WAYS_OF_USE: Mapping[str, tuple[str, ...]] = {
    "mixin": ("subclass", "yaml"),
    "callback": ("yaml", "drop-in"),
    "datamodule": ("subclass", "yaml", "drop-in"),
    "module": ("subclass", "yaml"),
}


@dataclass(frozen=True)
class Example:
    """A tiny run that shows a component at work, as plain data; the conformance suite runs it.

    Args:
        network: Family of the tiny network: "llama", "gpt2", "bert", "t5", "vit", "mixtral".
        module: The ready LightningModule around it.
        arguments: Arguments of the component.
        data: "tokens" (random ids with labels), "classes", "pairs", "text" (rows for a DataModule), "none" (its own).
        module_arguments: Further arguments of the module.
        trains: Regular expression of the names that training may change; everything else must not move.
        second: Arguments of a second callback of the class in the same run.
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
    Technique(3, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers"),
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
    Technique(16, "Scattered or Connected? An Optimized Parameter-efficient Tuning Approach for Information Retrieval"),
    Technique(17, "ConceptMoE: Adaptive Token-to-Concept Compression for Implicit Compute Allocation"),
    Technique(18, "Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning"),
    Technique(19, "R-Tuning: Teaching Large Language Models to Refuse Unknown Questions"),
    Technique(20, "Error-driven Data-efficient Large Multimodal Model Tuning"),
    Technique(21, "LoKI: Low-damage Knowledge Implanting of Large Language Models"),
    Technique(22, "KnowPrompt: Knowledge-aware Prompt-tuning with Synergistic Optimization for Relation Extraction"),
    Technique(23, "Parameter-Efficient Fine-Tuning for Foundation Models"),
    Technique(24, "Teaching LLMs How to Learn with Contextual Fine-Tuning"),
    Technique(25, "Post-hoc Concept Bottleneck Models"),
    Technique(26, "Optimizing the Interface Between Knowledge Graphs and LLMs for Complex Reasoning"),
    Technique(27, "Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion"),
    Technique(28, "Choice of PEFT Technique in Continual Learning: Prompt Tuning is Not All You Need"),
    Technique(29, "From Symbolic Tasks to Code Generation: Diversification Yields Better Task Performers"),
    Technique(30, "What to Pre-Train on? Efficient Intermediate Task Selection"),
    Technique(31, "RA-DIT: Retrieval-Augmented Dual Instruction Tuning"),
    Technique(32, "One Adapter for All Programming Languages? Adapter Tuning for Code Search and Summarization"),
    Technique(33, "Training Large Language Models To Reason In Parallel With Global Forking Tokens"),
    Technique(34, "Fine-tuning Done Right in Model Editing"),
    Technique(35, "Neural Prompt Search"),
    Technique(36, "Hateful Meme Detection through Context-Sensitive Prompting and Fine-Grained Labeling"),
    Technique(37, "Editable User Profiles for Controllable Text Recommendation"),
    Technique(38, "Towards a Unified View of Parameter-Efficient Transfer Learning"),
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
    Technique(52, "AnalogSeeker: An Open-source Foundation Language Model for Analog Circuit Design"),
    Technique(53, "Fictitious Synthetic Data Can Improve LLM Factuality via Prerequisite Learning"),
    Technique(54, "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models"),
    Technique(55, "DART-Math: Difficulty-Aware Rejection Tuning for Mathematical Problem-Solving"),
    Technique(56, "SliceFine: The Universal Winning-Slice Hypothesis for Pretrained Networks"),
    Technique(57, "LESS: Selecting Influential Data for Targeted Instruction Tuning"),
    Technique(58, "HFT: Half Fine-Tuning for Large Language Models"),
    Technique(59, "Selecting Informative Contexts Improves Language Model Finetuning"),
    Technique(60, "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning"),
    Technique(61, "APE: A Data-Centric Benchmark for Efficient LLM Adaptation in Text Summarization"),
    Technique(
        62,
        "Exploring Parameter-Efficient Fine-Tuning Techniques for Code Generation with Large Language Models",
    ),
    Technique(63, "TST^R: Target Similarity Tuning Meets the Real World"),
    Technique(64, "DELIFT: Data Efficient Language model Instruction Fine Tuning"),
    Technique(65, "Explore Spurious Correlations at the Concept Level in Language Models for Text Classification"),
    Technique(66, "Inference-Aware Fine-Tuning for Best-of-N Sampling in Large Language Models"),
    Technique(67, "Concept Conductor: Orchestrating Multiple Personalized Concepts in Text-to-Image Synthesis"),
    Technique(68, "QFFT, Question-Free Fine-Tuning for Adaptive Reasoning"),
    Technique(69, "Encoder-based Domain Tuning for Fast Personalization of Text-to-Image Models"),
    Technique(70, "LoPT: Low-Rank Prompt Tuning for Parameter Efficient Language Models"),
    Technique(71, "Discover-then-Name: Task-Agnostic Concept Bottlenecks via Automated Concept Discovery"),
    Technique(72, "Prompt Tuned Embedding Classification for Multi-Label Industry Sector Allocation"),
    Technique(73, "Can we Constrain Concept Bottleneck Models to Learn Semantically Meaningful Input Features?"),
    Technique(74, "Low-Rank Continual Personalization of Diffusion Models"),
    Technique(75, "Enhancing the Reasoning Capabilities of Small Language Models via Solution Guidance Fine-Tuning"),
    Technique(76, "Empirical Analysis of the Strengths and Weaknesses of PEFT Techniques for LLMs"),
    Technique(77, "TAIL: Task-specific Adapters for Imitation Learning with Large Pretrained Models"),
    Technique(78, "Symbol tuning improves in-context learning in language models"),
    Technique(79, "How to Set the Learning Rate for Large-Scale Pre-training?"),
    Technique(80, "Low-rank finetuning for LLMs: A fairness perspective"),
    Technique(81, "Meta-Learning Online Adaptation of Language Models"),
    Technique(82, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning"),
    Technique(83, "AnyTaskTune: Advanced Domain-Specific Solutions through Task-Fine-Tuning"),
    Technique(84, "Approximated Prompt Tuning for Vision-Language Pre-trained Models"),
    Technique(85, "Model Stock: All we need is just a few fine-tuned models"),
    Technique(86, "Learning to Generate Research Idea with Dynamic Control"),
    Technique(87, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models"),
    Technique(
        88,
        "Adapt Once, Thrive with Updates: Transferable Parameter-Efficient Fine-Tuning on Evolving Base Models",
    ),
    Technique(89, "DPTDR: Deep Prompt Tuning for Dense Passage Retrieval"),
    Technique(90, "Effectiveness of Data Augmentation for Parameter Efficient Tuning with Limited Data"),
    Technique(91, "Unified Vision and Language Prompt Learning"),
    Technique(92, "ILLUME: Rationalizing Vision-Language Models through Human Interactions"),
    Technique(93, "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification"),
    Technique(94, "FAIT: Fault-Aware Fine-Tuning for Better Code Generation"),
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
    Technique(102, "LookAhead Tuning: Safer Language Models via Partial Answer Previews"),
    Technique(103, "Configurable Preference Tuning with Rubric-Guided Synthetic Data"),
    Technique(104, "Disentangling Reasoning Tokens and Boilerplate Tokens For Language Model Fine-tuning"),
    Technique(105, "CoLLEGe: Concept Embedding Generation for Large Language Models"),
    Technique(106, "Automatic Evaluation of Generative Models with Instruction Tuning"),
    Technique(
        107,
        "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with "
        "Semantic Calibration",
    ),
    Technique(
        108,
        "Long-Short Chain-of-Thought Mixture Supervised Fine-Tuning Eliciting Efficient Reasoning in "
        "Large Language Models",
    ),
    Technique(
        109,
        "Make Prompt-based Black-Box Tuning Colorful: Boosting Model Generalization from Three Orthogonal Perspectives",
    ),
    Technique(110, "Selective Mixup Fine-Tuning for Optimizing Non-Decomposable Objectives"),
    Technique(111, "Empowering Smaller Models: Tuning LLaMA and Gemma with Chain-of-Thought for Ukrainian Exam Tasks"),
    Technique(112, "Efficient Hyperparameter Tuning via Trajectory Invariance Principle"),
    Technique(113, "Parameter-Efficient Tuning with Special Token Adaptation"),
    Technique(114, "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning"),
    Technique(115, "TuneTables: Context Optimization for Scalable Prior-Data Fitted Networks"),
    Technique(
        116,
        "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural "
        "Large Language Models",
    ),
    Technique(117, "Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation"),
    Technique(118, "Exploring and Evaluating Personalized Models for Code Generation"),
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
        "lightning_peft.models.text_encoder.TextEncoder",
        "module",
        Example("bert", "TextEncoder", data="pairs"),
        {"accumulation": "in-batch negatives are those of the micro-batch"},
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
        "lightning_peft.datamodules.standard_library_code.StandardLibraryCode",
        "datamodule",
        Example(arguments={"max_examples": 16, "max_length": 256, "batch_size": 2}, data="none"),
    ),
    Component("lightning_peft.kernels.linear_cross_entropy.linear_cross_entropy", "function"),
)
