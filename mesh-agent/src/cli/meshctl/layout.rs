//! Text that fits: tables whose rows stay on one line, sentences that wrap.

use comfy_table::{Attribute, Cell, Color, ContentArrangement, presets};

/// Where it is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    pub(super) width: usize,
    /// Show more columns, cut nothing off.
    pub(super) wide: bool,
    pub(super) colour: bool,
}

impl Screen {
    /// What fits everywhere, and what a pipe gets.
    pub(super) const WIDTH: usize = 80;
}

/// How a column gives way where a row is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    Never,
    End,
    /// Of names the end tells more: `…-7d9f4b-x2x9p`.
    Start,
}

/// What a value means, for its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Plain,
    Good,
    Warning,
    Bad,
}

pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) cut: Cut,
    /// Only with `-o wide`.
    pub(super) wide: bool,
}

pub(super) const fn column(title: &'static str, cut: Cut) -> Column {
    Column { title, cut, wide: false }
}

pub(super) const fn wide(title: &'static str) -> Column {
    Column { title, cut: Cut::Never, wide: true }
}

pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<(String, Mood)>>,
}

/// Between two columns.
const GAP: usize = 2;
/// A column is not cut below this.
const MIN_CUT: usize = 8;

impl Table {
    pub(super) fn new(columns: Vec<Column>) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// A row with a value for each column, wide ones too.
    pub(super) fn row(&mut self, cells: Vec<(String, Mood)>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells);
    }

    pub(super) fn terminal_width() -> Option<usize> {
        comfy_table::Table::new().width().map(usize::from)
    }

    pub(super) fn render(mut self, screen: Screen) -> String {
        if !screen.wide {
            let shown: Vec<bool> = self.columns.iter().map(|c| !c.wide).collect();
            let keep = |i: &usize| shown[*i];
            for row in &mut self.rows {
                *row = std::mem::take(row).into_iter().enumerate().filter(|(i, _)| keep(i)).map(|(_, c)| c).collect();
            }
            self.columns.retain(|c| !c.wide);
            self.fit(screen.width);
        }
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        if screen.colour {
            // Without the padding, so that the blanks at the end of a line can be taken off.
            table.enforce_styling().style_text_only();
        } else {
            table.force_no_tty();
        }
        let bold = |title: &str| {
            if screen.colour { Cell::new(title).add_attribute(Attribute::Bold) } else { Cell::new(title) }
        };
        table.set_header(self.columns.iter().map(|c| bold(c.title)));
        for row in self.rows {
            table.add_row(row.into_iter().map(|(text, mood)| {
                let cell = Cell::new(text);
                match (screen.colour, mood) {
                    (false, _) | (true, Mood::Plain) => cell,
                    (true, Mood::Good) => cell.fg(Color::Green),
                    (true, Mood::Warning) => cell.fg(Color::Yellow),
                    (true, Mood::Bad) => cell.fg(Color::Red),
                }
            }));
        }
        table.discover_columns();
        for column in table.column_iter_mut() {
            column.set_padding((0, GAP as u16));
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    /// Cuts the widest column that may be cut until each row fits.
    fn fit(&mut self, width: usize) {
        let mut widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(i, c)| self.rows.iter().map(|r| chars(&r[i].0)).chain([chars(c.title)]).max().unwrap_or(0))
            .collect();
        loop {
            let total: usize = widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1);
            let may_cut = |i: &usize| {
                self.columns[*i].cut != Cut::Never && widths[*i] > MIN_CUT.max(chars(self.columns[*i].title))
            };
            if total <= width {
                break;
            }
            let Some(widest) = (0..widths.len()).filter(may_cut).max_by_key(|i| widths[*i]) else { break };
            widths[widest] -= 1;
        }
        for row in &mut self.rows {
            for ((text, _), (width, column)) in row.iter_mut().zip(widths.iter().zip(&self.columns)) {
                *text = cut(text, *width, column.cut);
            }
        }
    }
}

fn chars(text: &str) -> usize {
    text.chars().count()
}

fn cut(text: &str, width: usize, cut: Cut) -> String {
    let length = chars(text);
    if length <= width {
        return text.to_owned();
    }
    match cut {
        Cut::Never => text.to_owned(),
        Cut::End => text.chars().take(width - 1).chain(['…']).collect(),
        Cut::Start => std::iter::once('…').chain(text.chars().skip(length - (width - 1))).collect(),
    }
}

/// Breaks `text` between words; the second and later lines begin with `indent` blanks. A word that is too long stays
/// whole: it is a path or a name that somebody wants to copy.
pub(in crate::cli) fn wrap(text: &str, width: usize, indent: usize) -> String {
    let mut out = String::new();
    let mut column = 0;
    for word in text.split(' ') {
        if column > indent && column + 1 + chars(word) > width {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += chars(word);
    }
    out
}

/// `1536` -> `1.5 KiB`
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 || unit == "TiB" {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    unreachable!("the last unit takes everything")
}

/// The two largest units: `2h5m`, `3d`, `7s`.
pub(super) fn age(seconds: u64) -> String {
    let parts = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let Some(first) = parts.iter().position(|(n, _)| *n > 0) else { return "0s".to_owned() };
    parts[first..].iter().take(2).filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect()
}
