"""Old module and class names of stbench and their new ones.

Lets the error about a plug-in written for an earlier version say what to rename.
"""

from __future__ import annotations

import ast

RENAMED = {
    "stbench.adaln": "stbench.backbones.dit",
    "stbench.align": "stbench.models.align",
    "stbench.checkpoints": "stbench.models.weights",
    "stbench.contracts.Artifact": "stbench.core.recipe.Artifact",
    "stbench.contracts.Backbone": "stbench.core.backbone.Backbone",
    "stbench.contracts.BackboneInfo": "stbench.core.backbone.BackboneInfo",
    "stbench.contracts.Batch": "stbench.core.objective.Batch",
    "stbench.contracts.Cost": "stbench.core.recipe.Cost",
    "stbench.contracts.Encoder": "stbench.core.recipe.Encoder",
    "stbench.contracts.Features": "stbench.core.backbone.Features",
    "stbench.contracts.Method": "stbench.core.recipe.Recipe",
    "stbench.contracts.Noised": "stbench.core.objective.Noised",
    "stbench.contracts.Objective": "stbench.core.objective.Objective",
    "stbench.contracts.Plain": "stbench.core.recipe.NoSupervision",
    "stbench.contracts.Recipe": "stbench.core.recipe.Supervision",
    "stbench.contracts.Stage": "stbench.core.recipe.Stage",
    "stbench.contracts.Step": "stbench.core.recipe.Step",
    "stbench.contracts.Term": "stbench.core.recipe.Term",
    "stbench.contracts.Weights": "stbench.core.backbone.Weights",
    "stbench.contracts": "stbench.core",
    "stbench.data.Dataset": "stbench.data.dataset.Dataset",
    "stbench.data.get_dataset": "stbench.data.dataset.get_dataset",
    "stbench.errors": "stbench.core.errors",
    "stbench.flops": "stbench.core.flops",
    "stbench.latents": "stbench.models.autoencoder",
    "stbench.layers": "stbench.models.layers",
    "stbench.objectives.diffusion": "stbench.diffusion.noise_prediction",
    "stbench.objectives.flow": "stbench.diffusion.flow",
    "stbench.objectives.schedule": "stbench.diffusion.schedule",
    "stbench.objectives": "stbench.diffusion",
    "stbench.official": "stbench.models.official",
    "stbench.registry.UserError": "stbench.core.errors.UserError",
    "stbench.registry": "stbench.core.registry",
    "stbench.rng": "stbench.core.rng",
    "stbench.samplers.base.Noise": "stbench.diffusion.sampler.Noise",
    "stbench.samplers.base.Sampler": "stbench.diffusion.sampler.Sampler",
    "stbench.samplers.base.draw": "stbench.diffusion.sampler.draw",
    "stbench.samplers.base": "stbench.diffusion.guidance",
    "stbench.samplers.diffusion": "stbench.diffusion.ddpm_samplers",
    "stbench.samplers.dpm_solver": "stbench.diffusion.dpm_solver",
    "stbench.samplers.flow": "stbench.diffusion.flow_samplers",
    "stbench.samplers": "stbench.diffusion.sample",
    "stbench.recipes.vae_align": "stbench.recipes.deep_supervision",
    "stbench.teachers": "stbench.models.encoders",
    "stbench.vae": "stbench.models.autoencoder",
}
"""Old dotted name -> new dotted name, of everything that a plug-in could import."""


def renamed_imports(source: str) -> dict[str, str]:
    """Return the renamed modules and names that Python source imports, old -> new, in order of appearance."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in imported:
            old = _renamed_prefix(name)
            if old:
                found[old] = RENAMED[old]
    return found


def _renamed_prefix(name: str) -> str | None:
    """The longest renamed prefix of a dotted name: the name itself, its module or a parent package."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((prefix for prefix in prefixes if prefix in RENAMED), None)
