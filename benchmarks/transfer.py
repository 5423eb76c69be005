"""Run a policy, unchanged, in a simulator that it was not trained in and that we did not write.

    python benchmarks/transfer.py pusht CHECKPOINT      # gym-pusht's own environment; pip install gym-pusht "pymunk<7"
    python benchmarks/transfer.py franka CHECKPOINT     # MuJoCo, with our parameters; pip install mujoco
"""

import math
import os
import pathlib
import sys
from collections.abc import Callable

import numpy as np
import torch
import tyro
from tyro.conf import Positional

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import envs
import evaluate
import models

PIXELS = 512  # of gym-pusht's workspace, our 1 m
LOOP_DT = 0.001  # s; the robot's impedance loop, and MuJoCo's step
LOOPS = round(envs.FRANKA_DT / LOOP_DT)  # in a control step
# From google-deepmind/mujoco_menagerie: franka_fr3/fr3.xml; franka_emika_panda/hand.xml, mounted as in its panda.xml.
JOINT_FRICTION, JOINT_DAMPING = (1.137, 1.137, 1.137, 1.137, 0.763, 0.44, 0.248), 0.21  # N m, N m s/rad
HAND = f"""<body pos="0 0 {envs.FLANGE}" euler="0 0 {-math.pi / 4}">
  <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/></body>"""


def load(task: str, path: str, episodes: int, seed: int) -> tuple[envs.Env, Callable, dict]:
    """The checkpoint's environments; its policy: observation [N, O] -> deterministic action [N, A]; and what it is."""
    checkpoint, env, actor, _, normalizer = evaluate.load(path, episodes, seed)
    if env.name != task:
        raise envs.UserError(f"{path} is a policy for {env.name}, not for {task}")
    facts = {"env": task, "algorithm": checkpoint["algorithm"], "seed": checkpoint["args"]["seed"]}
    return env, lambda observation: actor(normalizer(observation)), facts


def report(facts: dict, means: dict, out: pathlib.Path | None) -> None:
    """Print means over episodes {name: mean}, and add them with the facts to the CSV file `out`, if there is one."""
    for name, mean in means.items():
        print(f"{facts['simulator']}, {facts['changed']} changed: {name} {mean:.3f}")
        if out:
            evaluate.record(out, facts | {"measure": name, "mean": mean}, (*facts, "measure"))


def make_games(number: int, seed: int) -> list:
    """gym-pusht's environments as registered, with 300 steps; the i-th is reset with seed + i."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import gym_pusht  # noqa: F401, registers the environment
    import gymnasium
    import pymunk

    if not hasattr(pymunk.Space, "add_collision_handler"):
        raise envs.UserError('gym-pusht does not work with pymunk 7 or later: pip install "pymunk<7"')
    games = [gymnasium.make("gym_pusht/PushT-v0", disable_env_checker=True) for _ in range(number)]
    for i, game in enumerate(games):
        game.reset(seed=seed + i)
    return games


def state_of(game) -> list[float]:
    """Our state [S] of gym-pusht's environment: lengths over PIXELS, axes and angles as they are."""
    pusher, block = game.unwrapped.agent, game.unwrapped.block
    centre = block.local_to_world(block.center_of_gravity)
    return [*(x / PIXELS for x in (*pusher.position, *pusher.velocity, *centre)), block.angle]


def pusher_target(state: torch.Tensor, action: torch.Tensor) -> np.ndarray:
    """gym-pusht's action [N, 2], pixels, of our state [N, S] and action [N, 2]."""
    return (PIXELS * (state[:, :2] + envs.PUSHER_REACH * action.clamp(-1, 1)).clamp(0, 1)).double().numpy()


def pusht(path: Positional[str], episodes: int = 256, seed: int = 0, out: pathlib.Path | None = None) -> None:
    """Run a policy in gym-pusht's own environment, with its initial states, its reward, 300 steps and its end at success.

    score: mean over episodes of the largest reward, min(1, coverage / 0.95); success: share of episodes in which coverage
    exceeds 0.95.

    Args:
        path: a run folder or a checkpoint file
        episodes: number of episodes
        seed: seed of the first episode; the next one has the next seed
        out: CSV file to add the metrics to
    """
    env, policy, facts = load("pusht", path, episodes, seed)
    games = make_games(episodes, seed)
    best, hit = np.zeros(episodes), np.zeros(episodes, bool)
    for _ in range(games[0].spec.max_episode_steps):
        state = torch.tensor([state_of(game) for game in games])
        with torch.no_grad():
            target = pusher_target(state, policy(env.observe(state)))
        for i in (~hit).nonzero()[0]:  # the others' episodes have ended
            _, reward, terminated, _, _ = games[i].step(target[i])
            hit[i], best[i] = terminated, max(best[i], reward)
    facts |= {"simulator": "gym-pusht", "changed": "nothing"}
    report(facts, {"score": best.mean(), "success": hit.mean()}, out)


def arm_xml(mass_scale: float = 1.0, friction: bool = False, hand: bool = False) -> str:
    """The FR3 for MuJoCo, with the parameters of envs.py: a torque motor at each joint, limited to the joint's effort."""
    text = lambda *numbers: " ".join(map(str, numbers))
    body, motors = HAND if hand else "", ""
    for i, joint in reversed(list(enumerate(envs.FR3))):
        xx, xy, xz, yy, yz, zz = (mass_scale * x for x in joint.inertia)
        body = f"""<body pos="{text(*joint.offset)}" euler="{joint.roll} 0 0">
          <inertial mass="{mass_scale * joint.mass}" pos="{text(*joint.com)}" fullinertia="{text(xx, yy, zz, xy, xz, yz)}"/>
          <joint name="{i}" axis="0 0 1" range="{joint.lower} {joint.upper}" armature="{envs.ARMATURE[i]}"
            frictionloss="{JOINT_FRICTION[i] * friction}" damping="{JOINT_DAMPING * friction}"/>
          {body}</body>"""
        motors = f'<motor joint="{i}" ctrlrange="{-joint.effort} {joint.effort}"/>' + motors
    return f"""<mujoco><compiler angle="radian"/>
      <option integrator="implicitfast" timestep="{LOOP_DT}" gravity="0 0 {-envs.GRAVITY}"/>
      <worldbody>{body}</worldbody><actuator>{motors}</actuator></mujoco>"""


def in_mujoco(env: envs.Env, xml: str, delay: int = 0) -> Callable:
    """`Env.dynamics` of franka for one episode, MuJoCo in the place of our physics: no gradient, and rewards of zero.

    The impedance controller compensates the nominal arm's gravity and Coriolis forces, whatever the arm in `xml`; its
    torques are held for LOOP_DT. Joint targets reach it `delay` ms late, but the state has the one last commanded, as a
    program on a real robot knows what it has sent.
    """
    import mujoco  # here, because pusht does without

    arm, nominal = mujoco.MjModel.from_xml_string(xml), mujoco.MjModel.from_xml_string(arm_xml())
    data, known = mujoco.MjData(arm), mujoco.MjData(nominal)
    stiffness, damping = np.array(envs.STIFFNESS), np.array(envs.DAMPING)
    law, commanded = env.dynamics, []  # targets [N, 7] at the start and at the end of each control step

    def dynamics(state: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        after = law(state, action)[0]  # the task's joint targets; where these took the arm is replaced below
        commanded.extend(s[:, 14:21].double().numpy() for s in ((after,) if commanded else (state, after)))
        target = []  # [LOOPS, N, 7], on the ramp from one command to the next
        for loop in range(1, LOOPS + 1):
            k, part = divmod(max(0, LOOPS * (len(commanded) - 2) + loop - delay), LOOPS)
            target.append(commanded[k] + part / LOOPS * (commanded[min(k + 1, len(commanded) - 1)] - commanded[k]))
        for i, (q, qd) in enumerate(state[:, :14].double().numpy().reshape(-1, 2, 7)):
            data.qpos[:], data.qvel[:] = q, qd
            for loop in range(LOOPS):
                known.qpos[:], known.qvel[:] = data.qpos, data.qvel
                mujoco.mj_step1(nominal, known)
                data.ctrl[:] = stiffness * (target[loop][i] - data.qpos) - damping * data.qvel + known.qfrc_bias
                mujoco.mj_step(arm, data)
            after[i, :14] = torch.from_numpy(np.concatenate([data.qpos, data.qvel]))
        return after, env.observe(after), torch.zeros(len(state))

    return dynamics


def franka(
    path: Positional[str], episodes: int = 256, seed: int = envs.EVALUATION_SEED, delay: int = 0,
    mass_scale: float = 1.0, friction: bool = False, hand: bool = False, out: pathlib.Path | None = None,
) -> None:  # fmt: skip
    """Run a policy in MuJoCo and, from the same initial states, in our simulator: success as in `envs.score`.

    Args:
        path: a run folder or a checkpoint file
        episodes: number of episodes
        seed: seed of the initial states
        delay: ms until a command reaches the arm
        mass_scale: factor on the links' masses and inertias
        friction: Menagerie's joint friction and damping
        hand: an unmodelled hand of 0.73 kg at the flange
        out: CSV file to add the metrics to
    """
    if delay < 0:
        raise envs.UserError(f"--delay must be at least 0 ms, got {delay}")
    env, policy, facts = load("franka", path, episodes, seed)
    changes = {f"delay {delay}": delay, f"mass {mass_scale}": mass_scale != 1, "friction": friction, "hand": hand}
    changed = " ".join(name for name, given in changes.items() if given) or "nothing"
    success = lambda: {"success": envs.score(env, policy, seed)["success"]}
    report(facts | {"simulator": "ours", "changed": "nothing"}, success(), out)
    env.dynamics = in_mujoco(env, arm_xml(mass_scale, friction, hand), delay)
    report(facts | {"simulator": "MuJoCo", "changed": changed}, success(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.command(lambda: tyro.extras.subcommand_cli_from_dict({"pusht": pusht, "franka": franka}, description=__doc__))
