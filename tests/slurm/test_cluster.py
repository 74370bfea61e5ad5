"""The cluster that the other tests run on is a real one."""

from slurm.conftest import KILL_WAIT_S, MAX_ARRAY_SIZE, NUM_NODES, Cluster


def test_four_nodes_are_idle(cluster: Cluster) -> None:
    assert cluster.node_states() == dict.fromkeys(cluster.nodes, "idle")
    assert len(cluster.nodes) == NUM_NODES


def test_a_step_of_two_tasks_runs_on_two_nodes(cluster: Cluster) -> None:
    done = cluster.run(
        "srun", "-N", "2", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    )
    assert sorted(done.stdout.splitlines()) == [f"{name} 0,1" for name in cluster.nodes[:2]]


def test_an_array_index_beyond_the_limit_is_refused(cluster: Cluster) -> None:
    last = cluster.submit("--hold", f"--array={MAX_ARRAY_SIZE - 1}")
    assert cluster.states(last) == {f"{last}_{MAX_ARRAY_SIZE - 1}": "PENDING"}
    refused = cluster.run("sbatch", "-o", "/dev/null", f"--array={MAX_ARRAY_SIZE}", "--wrap", "true", check=False)
    assert refused.returncode == 1
    assert "Invalid job array specification" in refused.stderr


def test_a_job_in_high_preempts_one_in_low(cluster: Cluster) -> None:
    low = cluster.submit("-p", "low")
    cluster.wait(lambda: cluster.state(low) == "RUNNING", 10, "the first job runs")
    high = cluster.occupy("high")
    cluster.wait(lambda: cluster.state(high) == "RUNNING", KILL_WAIT_S + 20, "the second job runs")
    assert cluster.state(low) == "PENDING"
    assert cluster.show(low)["Restarts"] == "1"


def test_a_node_that_fails_is_back_when_it_is_restored(cluster: Cluster) -> None:
    name = cluster.nodes[-1]
    job = cluster.submit("-w", name)
    cluster.wait(lambda: cluster.state(job) == "RUNNING", 10, "the job runs")
    cluster.node("fail", name)
    assert cluster.node_states()[name].startswith("down")
    assert cluster.state(job) == "PENDING"
    cluster.restore()
    assert cluster.node_states() == dict.fromkeys(cluster.nodes, "idle")
    assert cluster.squeue() == []
