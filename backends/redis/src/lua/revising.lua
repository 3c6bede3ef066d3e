local function number(n) return string.format('%.0f', n) end

local function bump(last)
  if not revision then
    revision = math.max(tonumber(last or call('HGET', H, 'rev') or 0) + 1, now)
  end
  return revision
end

local function store()
  if revision and not stored then
    call('HSET', H, 'rev', number(revision))
    stored = true
  end
end
