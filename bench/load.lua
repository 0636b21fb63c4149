-- Each request asks for a certificate for a device that never asked before: wrk ... URL -- PREFIX keep-alive|close
local prefix, headers, number

function init(args)
  prefix, number = args[1], 0
  headers = { ["Content-Type"] = "application/json", ["Connection"] = args[2] }
end

function request()
  number = number + 1
  local body = string.format('{"ProductKey":"a1MadeUpPk0","DeviceID":"%s-%d","Action":0}', prefix, number)
  return wrk.format("POST", "/", headers, body)
end
