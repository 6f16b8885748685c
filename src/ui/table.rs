//! Formats rows of cells as lines with aligned columns. There is no I/O here.

use unicode_width::UnicodeWidthStr;

use crate::text::fit;

/// Formats rows as lines with aligned columns, with two blanks between them.
/// The last column is not padded. The cells must be escaped already.
pub fn table(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = cell.width();
            match widths.get_mut(i) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, widest) in row.iter().zip(&widths) {
            let padding = widest - cell.width() + 2;
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Cuts the cells of one column so that the lines of [`table`] fit into
/// `columns` columns of a terminal. A cell keeps at least 8 columns.
pub fn narrow(rows: &mut [Vec<String>], column: usize, columns: usize) {
    const LEAST: usize = 8;
    let width = |column: usize| rows.iter().filter_map(|row| Some(row.get(column)?.width())).max();
    let all = (0..).map_while(width).enumerate();
    let others: usize = all.filter(|(other, _)| *other != column).map(|(_, width)| width + 2).sum();
    let room = columns.saturating_sub(others).max(LEAST);
    for cell in rows.iter_mut().filter_map(|row| row.get_mut(column)) {
        *cell = fit(cell, room).into_owned();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_by_what_a_terminal_shows() {
        let rows = [
            vec!["a".into(), "日本".into(), "x".into()],
            vec!["bb".into(), "c".into(), String::new()],
        ];
        assert_eq!(table(&rows), "a   日本  x\nbb  c\n");
    }

    #[test]
    fn one_column_gives_way_where_lines_are_too_long() {
        let rows = |name: &str| vec![vec!["a".into(), name.into(), "end".into()]];
        for (name, columns, shown) in [
            ("0123456789", 19, "a  0123456789  end\n"),
            ("0123456789", 18, "a  0123456789  end\n"),
            ("0123456789", 17, "a  01234567…  end\n"),
            ("0123456789", 3, "a  0123456…  end\n"),
            ("short", 3, "a  short  end\n"),
        ] {
            let mut rows = rows(name);
            narrow(&mut rows, 1, columns);
            assert_eq!(table(&rows), shown, "{name} in {columns}");
        }
    }
}
