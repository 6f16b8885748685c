//! The speed of a device.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use super::{ParseError, number, wrong};

/// A speed in tenths of a megabit per second, because the slowest devices run
/// at 1.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Speed(u32);

impl Speed {
    /// Full speed, 12 Mb/s.
    pub const FULL: Speed = Speed(120);
    /// High speed, 480 Mb/s.
    pub const HIGH: Speed = Speed(4_800);
    /// SuperSpeed, 5 Gb/s.
    pub const SUPER: Speed = Speed(50_000);
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 10 {
            0 => write!(f, "{}", self.0 / 10),
            tenth => write!(f, "{}.{tenth}", self.0 / 10),
        }
    }
}

impl FromStr for Speed {
    type Err = ParseError;

    /// Reads megabits per second, as in the sysfs attribute `speed` and in
    /// QEMU's `info usb`: `1.5`, `12`, `480`, `5000`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let parse = || {
            let (whole, tenth) = text.split_once('.').unwrap_or((text, "0"));
            let whole: u32 = number(whole)?;
            let tenth: u32 = if tenth == "0" { 0 } else { number(tenth).filter(|t| *t < 10)? };
            Some(Speed(whole.checked_mul(10)?.checked_add(tenth)?))
        };
        parse().ok_or_else(|| wrong(text, "a speed in Mb/s like `480` or `1.5`"))
    }
}

impl Serialize for Speed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 % 10 {
            0 => serializer.serialize_u32(self.0 / 10),
            _ => serializer.serialize_f64(f64::from(self.0) / 10.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_print_as_the_kernel_writes_them() {
        for text in ["1.5", "12", "480", "5000", "10000", "20000"] {
            assert_eq!(text.parse::<Speed>().unwrap().to_string(), text);
        }
        assert!("480".parse::<Speed>().unwrap() == Speed::HIGH);
        for text in ["", "0", "unknown", "1.55", "-1", "99999999999"] {
            assert!(text.parse::<Speed>().is_err(), "{text}");
        }
        let json = |text: &str| serde_json::to_string(&text.parse::<Speed>().unwrap()).unwrap();
        assert_eq!((json("1.5"), json("480")), ("1.5".into(), "480".into()));
    }
}
