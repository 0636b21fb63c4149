-- The requests of the benchmarks: wrk ... URL -- keep-alive|close REQUEST PREFIX
-- A device that never asked before has the PREFIX of the run; the others are the DEVICES that bench/serve.py prepared.
local DEVICES = 500
local requests, number, prefix = {}, 0, ""

local function body(product, device, action)
  return string.format('{"ProductKey":"%s","DeviceID":"%s","Action":%d}', product, device, action)
end

function requests.allocate()
  return body("a1MadeUpPk0", prefix .. "-" .. number, 0)
end

function requests.again()
  return body("a1MadeUpPk0", "again-" .. number % DEVICES, 0)
end

-- Succeeded and failed in turn: a report that changes nothing is not recorded again.
function requests.report()
  return body("a1MadeUpPk0", "report-" .. number % DEVICES, 1 + math.floor(number / DEVICES) % 2)
end

function requests.unknown()
  return body("a1Nowhere", "again-" .. number % DEVICES, 0)
end

function requests.bad()
  return '{"ProductKey":"a1MadeUpPk0","DeviceID":'
end

local made, headers

function init(args)
  headers = { ["Content-Type"] = "application/json", ["Connection"] = args[1] }
  made, prefix = requests[args[2]], args[3]
end

function request()
  number = number + 1
  return wrk.format("POST", "/", headers, made())
end
