//! What a plugin logs arrives at the host's subscriber.

use setu_core::Registries;
use setu_core::scheduler::DecisionBuffer;
use setu_core::view::StepOutcome;
use setu_engine::plugins::{PluginOptions, discover};
use setu_testkit::views::Scene;
use setu_tests::extensions::{extension, plugin_folder};
use setu_tests::logs::{Logs, keep_logs, logs_beginning, panic_at_logs, take_logs};
use tracing::Level;

fn talkative() -> Registries {
    keep_logs();
    let folder = plugin_folder([("two.so", extension("two-in-one"))]);
    let mut registries = Registries::default();
    let report = discover(&[folder.path().to_owned()], &PluginOptions::default(), &mut registries).unwrap();
    assert_eq!(report.rejected, []);
    registries
}

#[test]
fn messages_keep_level_target_and_typed_fields() {
    let registries = talkative();
    let mut scheduler = (registries.schedulers.get("talkative").unwrap().build)("{}").unwrap();
    let mut scene = Scene::new(1.5);
    scene.step = 9;
    scene.waiting(7, 1.0, 10);
    let text = |text: &str| Logs::Text(text.to_owned());
    let expected = [
        (Level::TRACE, "two_in_one", "looking", vec![("step", Logs::Unsigned(9))]),
        (Level::DEBUG, "two_in_one", "runs", vec![("session", Logs::Unsigned(7)), ("urgent", Logs::Bool(false))]),
        (
            Level::INFO,
            "two_in_one",
            "planned a step",
            vec![("mood", text("good")), ("now_s", Logs::Float(1.5)), ("step", Logs::Unsigned(9))],
        ),
        (Level::WARN, "two_in_one::warnings", "nothing to warn of in step 9", vec![("delta", Logs::Signed(-3))]),
        (Level::ERROR, "two_in_one", "no error either", vec![("cause", Logs::Shown("Some(\"none\")".to_owned()))]),
    ];
    // The second time, the host knows the places that log already.
    for _ in 0..2 {
        take_logs();
        scene.schedule(&mut *scheduler);
        let logged = take_logs();
        assert_eq!(logged.len(), expected.len());
        for (logged, (level, target, message, fields)) in logged.iter().zip(&expected) {
            assert_eq!((logged.level, logged.target.as_str(), logged.message.as_str()), (*level, *target, *message));
            let mut fields = fields.clone();
            fields.push(("plugin", text("two-in-one")));
            let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            assert_eq!(logged.fields, fields);
        }
    }
}

#[test]
fn a_panic_on_a_thread_of_the_plugins_own_is_logged() {
    let registries = talkative();
    let mut batcher = (registries.batchers.get("talkative").unwrap().build)("{}").unwrap();
    let mut outcome = StepOutcome::default();
    outcome.step = 77;
    batcher.observe(&outcome);
    let [logged] = &logs_beginning("a thread panicked: lost step 77 (src/lib.rs:")[..] else { panic!("not logged") };
    assert_eq!((logged.level, &logged.fields["thread"]), (Level::ERROR, &Logs::Text("observer".to_owned())));
}

#[test]
fn a_panic_of_the_hosts_subscriber_stays_on_its_side() {
    let registries = talkative();
    let mut scheduler = (registries.schedulers.get("talkative").unwrap().build)("{}").unwrap();
    let scene = Scene::new(1.0);
    for panicking in [true, false] {
        panic_at_logs(panicking);
        let scheduled = DecisionBuffer::default().fill(1, |decisions| scheduler.schedule(&scene.view(), decisions));
        panic_at_logs(false);
        assert_eq!(scheduled, Ok(()));
    }
    assert!(!take_logs().is_empty());
}
