//! The mesh in a real Kubernetes: real API server, kubelets, containerd and CNI; installed, used, upgraded and removed with
//! the commands that its users have. One story: the cases run in this order, each in a namespace of its own.

mod faults;
mod install;
mod life;
mod rights;
mod stage;
mod traffic;

use std::process::ExitCode;

use mesh_tests::ring::{Case, run_shared};
use stage::Stage;

const CASES: &[Case<Stage>] = &[
    ("installs_from_nothing_and_twice_is_once", install::installs_from_nothing_and_twice_is_once),
    ("running_pods_join_and_leave_by_a_label", traffic::running_pods_join_and_leave_by_a_label),
    ("a_pod_opts_out_and_in", traffic::a_pod_opts_out_and_in),
    ("the_first_packet_of_a_new_pod_is_meshed", traffic::the_first_packet_of_a_new_pod_is_meshed),
    ("probes_of_all_kinds_pass_under_strict", traffic::probes_of_all_kinds_pass_under_strict),
    ("names_of_all_kinds_are_served", traffic::names_of_all_kinds_are_served),
    ("applications_see_their_clients_addresses", traffic::applications_see_their_clients_addresses),
    ("a_rollout_under_traffic_fails_no_request", traffic::a_rollout_under_traffic_fails_no_request),
    ("pods_that_cannot_be_in_the_mesh_say_so", traffic::pods_that_cannot_be_in_the_mesh_say_so),
    (
        "an_agent_that_is_deleted_comes_back_and_opens_nothing",
        life::an_agent_that_is_deleted_comes_back_and_opens_nothing,
    ),
    ("without_an_agent_only_the_mesh_waits", life::without_an_agent_only_the_mesh_waits),
    ("a_cni_configuration_that_is_overwritten_is_mended", life::a_cni_configuration_that_is_overwritten_is_mended),
    ("api_server_and_controller_may_be_away", life::api_server_and_controller_may_be_away),
    ("settings_change_while_everything_runs", life::settings_change_while_everything_runs),
    ("an_upgrade_loses_no_request_and_no_connection", life::an_upgrade_loses_no_request_and_no_connection),
    ("a_broken_ca_changes_nothing", faults::a_broken_ca_changes_nothing),
    ("a_name_that_is_used_again_is_another_pod", faults::a_name_that_is_used_again_is_another_pod),
    ("programs_of_a_node_may_be_restarted", faults::programs_of_a_node_may_be_restarted),
    ("accounts_may_do_what_is_written_and_no_more", rights::accounts_may_do_what_is_written_and_no_more),
    ("an_agent_gets_identities_of_its_own_node_only", rights::an_agent_gets_identities_of_its_own_node_only),
    ("what_is_wrong_is_refused_in_a_sentence", rights::what_is_wrong_is_refused_in_a_sentence),
    ("uninstalling_leaves_the_nodes_as_they_were", install::uninstalling_leaves_the_nodes_as_they_were),
];

fn main() -> ExitCode {
    run_shared(Stage::set, |_| {}, |stage| stage.kube.mesh_logs(), CASES)
}
