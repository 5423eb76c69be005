"""Score a trained policy: python evaluate.py policy RUN_DIR_OR_CHECKPOINT"""

import sys

import torch
import tyro

import envs
from models import Actor, Normalizer, load_checkpoint


def policy(path: tyro.conf.Positional[str], num_envs: int = 256, seed: int = envs.EVALUATION_SEED, device: str = "cpu"):
    """Print the return, success and errors of a checkpoint's deterministic policy over one episode an environment.

    Args:
        path: a run folder or a checkpoint file
        num_envs: episodes to average over
        seed: of the episodes' starts; the default is the one that training curves are scored on
        device: cpu, cuda, cuda:1, ...
    """
    checkpoint = load_checkpoint(path)
    args = checkpoint["args"]
    env = envs.make(args["env"], num_envs, device, seed)
    actor = Actor(env.observation_size, env.action_size, args["hidden"]).to(device)
    normalizer = Normalizer(env.observation_size).to(device)
    actor.load_state_dict(checkpoint["actor"])
    normalizer.load_state_dict(checkpoint["normalizer"])
    result = envs.score(env, lambda observation: actor(normalizer(observation)), seed, measures=True)
    print(f"{args['env']} ({checkpoint['algorithm']}, {checkpoint['counters'][0]:,} environment steps), {num_envs} episodes")
    for name, value in result.items():
        limit = env.task.tolerances.get(name)
        print(envs.in_words(name, value) + ("" if limit is None else f" (success: below {limit:g})"))


def main():
    torch.set_num_threads(1)
    try:
        tyro.extras.subcommand_cli_from_dict({"policy": policy}, description=__doc__)
    except (ValueError, KeyError, RuntimeError) as error:
        print(f"evaluate.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
