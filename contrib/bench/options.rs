//! What is asked of a run; `contrib/bench/run` explains it.

pub struct Options {
    /// The program under test, and the C program that does nothing but look at the clock.
    pub tool: String,
    pub stamp: String,
    /// The script, and another program of this kind, if there is one.
    pub script: String,
    pub vhotplug: Option<String>,
    pub rounds: usize,
    pub burst_rounds: usize,
    /// How long `watch` is looked at while nothing happens, in seconds.
    pub idle: u64,
    /// How many events it must take without growing.
    pub events: usize,
}

impl Options {
    pub fn parse(words: &[&str]) -> Options {
        let value = |name: &str| -> Option<String> {
            let at = words.iter().position(|word| *word == name)?;
            Some((*words.get(at + 1).unwrap_or_else(|| panic!("{name} takes a value"))).to_owned())
        };
        let number = |name: &str, default: usize| -> usize {
            value(name).map_or(default, |text| text.parse().expect("a number"))
        };
        Options {
            tool: value("--tool").expect("--tool"),
            stamp: value("--stamp").expect("--stamp"),
            script: value("--script").expect("--script"),
            vhotplug: value("--vhotplug"),
            rounds: number("--rounds", 20),
            burst_rounds: number("--burst-rounds", 3),
            idle: number("--idle", 60) as u64,
            events: number("--events", 1000),
        }
    }
}
