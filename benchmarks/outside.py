"""PPO and SAC of stable-baselines3 on our tasks: code that we did not write, to see whether our own PPO is a straw man.

    python benchmarks/outside.py --env franka                                    # PPO with our settings
    python benchmarks/outside.py --env franka --recipe theirs --algorithm sac    # SAC, or PPO, with their defaults

Needs `pip install stable-baselines3`. Four things are theirs even with our settings: actions are clipped, not squashed by
tanh; sigma has no floor; actor and critic share a learning rate, our actor's; and the last weights are evaluated.
"""

import pathlib
import sys
import time
from math import inf, nan
from typing import Any, Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import envs
import models
import ppo

THEIRS = {"num_envs": 16, "learning_rate": 3e-4, "gamma": 0.99}  # their defaults under our names, but for num_envs
THEIRS_PPO = THEIRS | {"segment": 128, "gae_lambda": 0.95, "update_epochs": 10, "num_minibatches": 32, "clip_coef": 0.2}
THEIRS_SAC = THEIRS | {"segment": 1, "gae_lambda": nan, "update_epochs": nan, "num_minibatches": nan, "clip_coef": nan}


def adapter(env: envs.Env) -> Any:
    """The environments, wherever they are in their episodes, as a VecEnv of stable-baselines3."""
    from gymnasium.spaces import Box  # stable-baselines3 depends on it
    from stable_baselines3.common.vec_env import VecEnv

    class Adapter(VecEnv):
        def __init__(self):
            box = lambda size, bound: Box(-bound, bound, (size,), np.float32)
            super().__init__(env.num_envs, box(env.observation_size, inf), box(env.action_size, 1.0))

        def step_async(self, actions):
            self.actions = torch.from_numpy(actions)

        def step_wait(self):
            observation, reward, _, truncated, info = env.step(self.actions)
            infos = [{} for _ in range(env.num_envs)]
            for i in truncated.nonzero().flatten().tolist():
                infos[i] = {"terminal_observation": info["final_obs"][i].numpy(), "TimeLimit.truncated": True}
            return observation.numpy(), reward.numpy(), truncated.numpy(), infos

        reset = lambda self: env.observe(env.state).numpy()  # called once, before the first step
        get_attr = lambda self, name, indices=None: [None] * env.num_envs  # only asked for the render mode
        close = set_attr = env_method = env_is_wrapped = None  # abstract; training does not call them

    return Adapter()


def make_model(algorithm: str, recipe: str, args: ppo.Args, env: Any) -> Any:
    """The untrained model. env: a VecEnv."""
    import stable_baselines3 as sb3

    common = {"policy": "MlpPolicy", "seed": args.seed, "device": args.device}
    if algorithm == "sac":  # one gradient step per environment step, their default for one environment
        return sb3.SAC(env=env, train_freq=1, gradient_steps=-1, **common)
    if recipe == "theirs":
        return sb3.PPO(env=env, n_steps=args.segment, **common)
    networks = {"net_arch": [models.HIDDEN] * 2, "activation_fn": torch.nn.SiLU, "log_std_init": args.log_std}
    return sb3.PPO(
        env=sb3.common.vec_env.VecNormalize(env, norm_reward=False), n_steps=args.segment,
        batch_size=args.num_envs * args.segment // args.num_minibatches, n_epochs=args.update_epochs,
        learning_rate=lambda remaining: remaining * args.learning_rate, gamma=args.gamma, gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef, ent_coef=args.ent_coef, vf_coef=1.0, max_grad_norm=args.max_grad_norm,
        policy_kwargs={**networks, "optimizer_kwargs": {"betas": (0.9, 0.99)}}, **common,
    )  # fmt: skip


def main(
    algorithm: Literal["ppo", "sac"] = "ppo", recipe: Literal["ours", "theirs"] = "ours", env: str = "franka",
    total_env_steps: int | None = None, seed: int = 1, run_dir: str | None = None,
) -> None:  # fmt: skip
    """Train, and write config.json and metrics.csv as ppo.py does.

    Args:
        algorithm: PPO or SAC
        recipe: the settings of ppo.py, or the defaults of stable-baselines3
        env: task
        total_env_steps: env steps to train for; if not given, as many as ppo.py
        seed: seed of weights, initial states and action noise
        run_dir: where to write; if not given, a new folder in runs/
    """
    if (algorithm, recipe) == ("sac", "ours"):
        raise envs.UserError("--recipe ours is for PPO; --algorithm sac takes --recipe theirs")
    if run_dir and pathlib.Path(run_dir).exists():
        raise envs.UserError(f"{run_dir} exists: name another --run-dir")
    from stable_baselines3.common.callbacks import BaseCallback

    theirs = THEIRS_SAC if algorithm == "sac" else THEIRS_PPO
    settings = ppo.TUNED.get(env, {}) | (theirs if recipe == "theirs" else {})
    args = ppo.Args(**settings | {"env": env, "seed": seed, "run_dir": run_dir, "average_eta": 0.0})
    args.total_env_steps, args.critic_learning_rate = total_env_steps or args.total_env_steps, args.learning_rate
    run, env = models.Run(f"sb3-{algorithm}-{recipe}", args), envs.make(env, args.num_envs, seed=seed)
    run.save = lambda: None  # without checkpoints
    env.elapsed = torch.randint(env.episode_length, (env.num_envs,), generator=env.generator)  # out of step, as in ppo.py
    model = make_model(algorithm, recipe, args, adapter(env))
    normalizer = model.get_vec_normalize_env()

    class Evaluations(BaseCallback):
        _on_step = lambda self: not run.interrupted  # whether to go on

        def _on_rollout_start(self):  # after each update but the last
            updates = model._n_updates * (args.num_minibatches if algorithm == "ppo" else 1)  # PPO counts passes
            run.env_steps, run.gradient_steps = model.num_timesteps, updates
            run.wall_seconds += time.perf_counter() - run.clock_start
            if run.evaluation_is_due():
                run.evaluate()
            run.clock_start = time.perf_counter()

        _on_training_end = _on_rollout_start

    normalize = lambda observation: normalizer.normalize_obs(observation.numpy()) if normalizer else observation.numpy()
    run.start(env, lambda inputs: torch.from_numpy(model.predict(inputs, deterministic=True)[0]), normalize)
    model.learn(args.total_env_steps, Evaluations())
    if run.interrupted:
        sys.exit(128 + run.interrupted)
    run.finish()


if __name__ == "__main__":
    models.command(lambda: tyro.cli(main, description=__doc__))
